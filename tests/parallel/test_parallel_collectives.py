"""What the compiled decode step says between devices: how often, and nothing as large as a weight or a cache."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_collectives import collectives
from parallel_models import VOCAB, four_head_config, name_of
from sampling_states import sampling_state

from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.cache import PagePool
from minimax_jax.engine.row_state import Adjustments, empty_rows
from minimax_jax.engine.step_inputs import PickFeatures, PickInputs, StepInputs
from minimax_jax.parallel import ParallelConfig
from minimax_kernels import Batch

ROWS, HIDDEN, INDEX_HEADS, INDEX_DIM, TOPK = 2, 64, 4, 16, 2


def compiled_decode(sizes, layers, **options):
    """The optimised HLO of a greedy decode step of sparse layers with experts: layers, then picking."""
    config = four_head_config(
        num_hidden_layers=layers, layer_types=("minimax_m3_sparse",) * layers, mlp_layer_types=("sparse",) * layers
    )
    model = MiniMaxM3ForCausalLM.from_config(config, parallel=ParallelConfig(*sizes, **options))
    ranks = model.ranks
    pool = PagePool(config, 64, jnp.float32, ranks.cache_placement)
    rows = ROWS * ranks.groups
    ids, ones = np.zeros(rows, np.int32), np.ones(rows, np.float32)
    starts = np.tile(np.arange(ROWS + 1, dtype=np.int32), ranks.groups)
    batch = Batch(np.zeros((rows, 4), np.int32), starts, ids + 3)
    none = np.zeros((rows, 0), np.int32)
    changes = Adjustments(ones, ones, ones, none, np.zeros((rows, 0), np.float32), none, ids)
    picking = PickInputs(ids, ids, ids, sampling_state(0, rows, 0.0, 1.0, 0, VOCAB), changes)
    given = (StepInputs(ids, ids - 1, ids + 2, ids, batch, ids), picking, empty_rows(rows, VOCAB))
    step, picking, state = ranks.place(given, jax.tree.map(lambda _: ranks.rows, given))
    steps, leaves = model._steps, model._leaves
    layers = steps.layers.lower(leaves, pool.caches, state.last_tokens, step).compile()
    hidden = jax.ShapeDtypeStruct((rows, HIDDEN), jnp.float32, sharding=layers.output_shardings[0])
    pick = steps.pick.lower(leaves, state, hidden, picking, features=PickFeatures()).compile()
    return layers.as_text() + pick.as_text()


@pytest.mark.parametrize(
    ("sizes", "a_layer", "a_step"),
    [
        pytest.param((8, 1, 1), {"all-reduce": 2}, {"all-reduce": 1, "all-gather": 1}, marks=pytest.mark.slow),
        ((8, 8, 1), {"all-reduce": 2}, {"all-reduce": 1, "all-gather": 1}),
        pytest.param((4, 8, 1), {"all-reduce": 2}, {"all-reduce": 1, "all-gather": 1}, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), {"all-reduce": 1}, {"all-reduce": 1, "all-gather": 1}, marks=pytest.mark.slow),
        ((1, 8, 8), {"all-gather": 2, "reduce-scatter": 1}, {}),
        (
            (2, 8, 4),
            {"all-reduce": 2, "all-gather": 2, "reduce-scatter": 1},
            {"all-reduce": 1, "all-gather": 1},
        ),
    ],
    ids=lambda value: name_of(value) if isinstance(value, tuple) else "",
)
def test_collectives_of_a_layer_and_of_a_step(sizes, a_layer, a_step):
    one, two = (collectives(compiled_decode(sizes, layers)) for layers in (1, 2))
    counts = [collections.Counter(kind for kind, _ in found) for found in (one, two)]
    assert counts[1] - counts[0] == a_layer
    assert counts[0] - collections.Counter(a_layer) == a_step
    # tokens of all data ranks, and eight ranks' best tokens: no weight, no cache, no logits
    assert_no_more_than(max(ROWS * sizes[2] * HIDDEN, 8 * 2 * ROWS), one + two)


@pytest.mark.parametrize("sizes", [(8, 8, 1), (2, 8, 4)], ids=name_of)
def test_shared_out_index_keys_cost_a_gather_and_an_exchange_in_each_sparse_layer(sizes):
    tensor, _, data = sizes
    without, shared = (collectives(compiled_decode(sizes, 1, split_index_keys=split)) for split in (False, True))
    counts = [collections.Counter(kind for kind, _ in found) for found in (without, shared)]
    assert counts[1] - counts[0] == {"all-gather": 1, "all-to-all": 1} and not counts[0] - counts[1]
    queries = ROWS * INDEX_DIM * max(INDEX_HEADS, tensor)
    assert ("all-gather", queries) in shared  # of every rank, some of which have the same
    # scores and numbers of the best blocks, for the heads of every rank; one tuple element a rank on a CPU
    candidates = 2 * ROWS * TOPK * max(1, INDEX_HEADS // tensor)
    assert [size for kind, size in shared if kind == "all-to-all"] in ([candidates], [candidates * tensor])
    assert_no_more_than(max(ROWS * data * HIDDEN, queries), shared)


def assert_no_more_than(most, found):
    """Far less than a weight or the caches has."""
    assert all(size <= most for _, size in found)
    assert most < min(HIDDEN * 4 * 16, 64 * 16 * 16 // 8, VOCAB * HIDDEN)
