"""The training attention computes what inference computes."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimax_jax.attention import ReferenceAttend

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
pytest.importorskip("optax")
from tiny_attend import TrainingAttend
from train_tiny import tiny_config

SEQUENCES, LENGTH = 2, 512


@pytest.fixture(scope="module")
def operands():
    config = tiny_config().replace(index_topk_blocks=2)
    keys = jax.random.split(jax.random.key(0), 5)
    tokens = SEQUENCES * LENGTH
    shapes = [(8, 64), (4, 64), (4, 64), (4, 64), (1, 64)]
    return config, [jax.random.normal(key, (tokens, *shape)) for key, shape in zip(keys, shapes, strict=True)]


def reference(config, operands, *, dense=False):
    starts = jnp.arange(SEQUENCES + 1, dtype=jnp.int32) * LENGTH
    attend = ReferenceAttend(config, starts, SEQUENCES * LENGTH, LENGTH)
    q, k, v, idx_q, idx_k = operands
    return attend(2, q, k, v, None if dense else idx_q, None if dense else idx_k)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_attention_is_that_of_inference(operands, mode):
    config, arrays = operands
    attend = TrainingAttend(config, SEQUENCES, LENGTH, mode=mode, index_loss=True, chunk=128)
    got = attend(2, *arrays)
    np.testing.assert_allclose(got, reference(config, arrays, dense=mode == "dense"), atol=2e-5)
    other = reference(config, arrays, dense=mode == "sparse")
    assert float(jnp.abs(got - other).max()) > 1e-2  # the two modes differ at this length


def test_index_loss_falls_to_zero_where_index_and_main_agree(operands):
    """With one block there is one way to share attention, so the divergence is zero; with more it is not."""
    config, arrays = operands
    short = [x[:128] for x in arrays]
    one_block = TrainingAttend(config, 1, 128, mode="dense", index_loss=True)
    one_block(2, *short)
    assert float(one_block.index_losses[0]) == pytest.approx(0.0, abs=1e-6)
    many = TrainingAttend(config, SEQUENCES, LENGTH, mode="dense", index_loss=True, chunk=128)
    many(2, *arrays)
    assert float(many.index_losses[0]) > 0.01


def test_index_loss_moves_the_index_branch_alone(operands):
    config, arrays = operands

    def loss(arrays):
        attend = TrainingAttend(config, SEQUENCES, LENGTH, mode="sparse", index_loss=True, chunk=128)
        attend(2, *arrays)
        return attend.index_losses[0]

    norms = [float(jnp.abs(g).max()) for g in jax.grad(loss)(arrays)]
    assert norms[:3] == [0.0, 0.0, 0.0] and min(norms[3:]) > 0
