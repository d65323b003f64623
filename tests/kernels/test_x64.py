"""With JAX_ENABLE_X64 plain numbers and tables are of 64 bits; kernels go on counting in 32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_ops import Shape
from op_checks import SCALE, fixed_sample, options_of
from test_pallas_lowering import BATCHES, KERNEL, SHAPE, VARIANTS, lowered, operands

import minimax_kernels as mk

INTERPRETED = "pallas_triton_interpret"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def test_results_are_those_of_the_references():
    s = fixed_sample(Shape(T=70, R=1, N=6, B=16, Hq=8, Hkv=1, Hi=1, topk=3, D=32, local=2))
    batch = mk.Batch(*(jnp.asarray(x, jnp.int64) for x in (s.tables, s.starts, s.kv_lens)))
    assert batch.kv_lens.dtype == jnp.int64
    q, k_cache, v_cache, idx_q, index_cache = map(jnp.asarray, (s.q, s.k_cache, s.v_cache, s.idx_q, s.index_cache))

    @functools.partial(jax.jit, static_argnums=0)
    def attended(impl):
        return mk.msa(q, k_cache, v_cache, idx_q, index_cache, batch, scale=SCALE, impl=impl, **options_of(s.shape))

    @functools.partial(jax.jit, static_argnums=0)
    def written(impl):
        rows, slots = k_cache[0, :, :7].swapaxes(0, 1), jnp.array([80, -1, 17, 3, 4, 5, 6])
        return mk.write_kv(k_cache, v_cache, rows, 2 * rows, slots, impl=impl)

    np.testing.assert_allclose(attended(INTERPRETED), attended("reference"), atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, written(INTERPRETED), written("reference"))


@pytest.mark.parametrize("batch", ["prefill", "decode"])
def test_kernels_lower(batch):
    q, k_cache, v_cache, idx_q, index_cache, requests, scores, _ = operands(VARIANTS[1], batch)
    rows = SHAPE((BATCHES[batch][0], *k_cache.shape[1::2]), q.dtype)
    texts = [
        lowered("msa", q, k_cache, v_cache, idx_q, index_cache, requests, scale=0.1, topk=16),
        lowered("dense_attention", q, k_cache, v_cache, requests, scale=0.1),
        lowered("select_blocks", scores, requests, topk=16, init_blocks=1),
        lowered("write_kv", k_cache, v_cache, rows, rows, SHAPE((rows.shape[0],), jnp.int64)),
    ]
    assert all(KERNEL in text for text in texts)
