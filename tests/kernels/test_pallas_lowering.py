"""Every kernel and shape that GPUs are promised lowers to CUDA, here, without a GPU."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import minimax_kernels as mk

KERNEL = "__gpu$xla.gpu.triton"
SHAPE = jax.ShapeDtypeStruct


class Variant(NamedTuple):
    """Sizes of a layer's caches and heads."""

    q_heads: int = 64
    kv_heads: int = 4
    index_heads: int = 4
    head_dim: int = 128
    block: int = 128
    topk: int = 16
    dtype: str = "bfloat16"
    pages: int = 1000
    cache_dtype: str = ""  # dtype's

    def __str__(self) -> str:
        heads, caches = (
            f"{self.q_heads}_{self.kv_heads}_{self.index_heads}",
            f"-{self.cache_dtype}" * bool(self.cache_dtype),
        )
        return f"{heads}-D{self.head_dim}-B{self.block}-{self.dtype}-top{self.topk}-P{self.pages}{caches}"


VARIANTS = [
    Variant(),
    Variant(8, 1, 1),
    Variant(16, 1, 1),
    Variant(32, 2, 2),
    Variant(index_heads=1),
    Variant(32, 2, 1),
    Variant(32, 2, 4),
    Variant(head_dim=64),
    Variant(8, 1, 1, head_dim=64, block=64, dtype="float16"),
    Variant(block=64),
    Variant(dtype="float16"),
    Variant(topk=8),
    Variant(8, 1, 1, topk=32),
    Variant(pages=20_000),  # K and V of 2.6 GB each
    Variant(pages=40_000),  # 5.2 GB
    Variant(cache_dtype="float8_e4m3fn"),
    Variant(8, 1, 1, head_dim=64, block=64, dtype="float16", cache_dtype="float8_e4m3fn"),
]
BATCHES = {  # tokens, requests, blocks a request
    "prefill": (2048, 3, 400),
    "one token": (1, 1, 65),
    "decode": (64, 64, 800),
    "verify": (64, 8, 300),
    "short": (40, 2, 1),
    "2M tokens": (2, 2, 16384),
}


@contextlib.contextmanager
def imagined_gpu():
    """From jax 0.11 on, lowering asks which GPU it is for."""
    try:
        from jax.sharding import AbstractDevice, use_abstract_mesh
    except ImportError:
        yield
        return
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    with use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield


def lowered(op: str, *args, donate=(), **options) -> str:
    """The operation as StableHLO for CUDA."""
    function = functools.partial(getattr(mk, op), impl="pallas_triton", **options)
    with imagined_gpu():
        return jax.jit(function, donate_argnums=donate).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def operands(v: Variant, batch: str):
    """(q, k_cache, v_cache, idx_q, index_cache, batch, scores, selected), as shapes."""
    tokens, requests, blocks = BATCHES[batch]
    cache_dtype = v.cache_dtype or v.dtype
    cache = SHAPE((v.pages, v.kv_heads, v.block, v.head_dim), cache_dtype)
    i32 = jnp.int32
    return (
        SHAPE((tokens, v.q_heads, v.head_dim), v.dtype),
        cache,
        cache,
        SHAPE((tokens, v.index_heads, v.head_dim), v.dtype),
        SHAPE((v.pages, v.block, v.head_dim), cache_dtype),
        mk.Batch(SHAPE((requests, blocks), i32), SHAPE((requests + 1,), i32), SHAPE((requests,), i32)),
        SHAPE((v.index_heads, tokens, blocks), jnp.float32),
        SHAPE((max(v.kv_heads, v.index_heads), tokens, v.topk), i32),
    )


each_variant = pytest.mark.parametrize("v", VARIANTS, ids=str)


@each_variant
@pytest.mark.parametrize("batch", ["prefill", "decode", pytest.param("verify", marks=pytest.mark.long)])
def test_attention_chain_lowers(v, batch):
    """msa is the chain of the three; with `out`, which is aliased, and without."""
    q, k_cache, v_cache, idx_q, index_cache, requests, _, _ = operands(v, batch)
    args = (q, k_cache, v_cache, idx_q, index_cache, requests)
    for out in (None, q):
        text = lowered("msa", *args, scale=0.1, topk=v.topk, **({} if out is None else {"init_blocks": 1}))
        assert text.count(KERNEL) >= 3, "scoring, selection and attention are kernels"


@each_variant
def test_each_operation_lowers(v):
    q, k_cache, v_cache, idx_q, index_cache, requests, scores, selected = operands(v, "prefill")
    texts = [
        lowered("index_score", idx_q, index_cache, requests),
        lowered("select_blocks", scores, requests, topk=v.topk),
        lowered("sparse_attention", q, k_cache, v_cache, selected, requests, scale=0.1),
        lowered("dense_attention", q, k_cache, v_cache, requests, scale=0.1),
    ]
    new = SHAPE((77, v.kv_heads, v.head_dim), v.dtype)
    slots = SHAPE((77,), jnp.int32)
    texts.append(lowered("write_kv", k_cache, v_cache, new, new, slots, donate=(0, 1)))
    keys = SHAPE((77, 1, v.head_dim), v.dtype)
    texts.append(lowered("write_index", index_cache, keys, slots, donate=(0,)))
    texts.append(lowered("write_kv_index", k_cache, v_cache, index_cache, new, new, keys, slots, donate=(0, 1, 2)))
    assert texts[-1].count(KERNEL) == 1
    assert all(KERNEL in text for text in texts)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("v", VARIANTS[:2], ids=str)
def test_every_batch_lowers(v, batch):
    q, k_cache, v_cache, idx_q, index_cache, requests, scores, _ = operands(v, batch)
    assert KERNEL in lowered("msa", q, k_cache, v_cache, idx_q, index_cache, requests, scale=0.1, topk=v.topk)
    assert KERNEL in lowered("dense_attention", q, k_cache, v_cache, requests, scale=0.1)
    assert KERNEL in lowered("select_blocks", scores, requests, topk=v.topk, init_blocks=1, local_blocks=2)


def test_out_is_aliased():
    """The result goes into the caller's buffer: no copy of it is made."""
    q, k_cache, v_cache, _, _, requests, _, selected = operands(VARIANTS[1], "prefill")

    def attend(out, q, k_cache, v_cache, selected, requests):
        return mk.sparse_attention(q, k_cache, v_cache, selected, requests, scale=0.1, out=out, impl="pallas_triton")

    with imagined_gpu():
        traced = jax.jit(attend, donate_argnums=0).trace(q, q, k_cache, v_cache, selected, requests)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "output_operand_alias" in text and "tf.aliasing_output" in text


def mxfp8(*shape):
    *lead, inputs, outputs = shape
    values = SHAPE((*lead, outputs, inputs), jnp.float8_e4m3fn)
    return mk.Mxfp8(values, SHAPE((*lead, outputs, inputs // 32), jnp.uint8))


@pytest.mark.parametrize("tokens", [1, 33, 300, 8192])
def test_products_with_mxfp8_weights_lower(tokens):
    """One TP8 and EP8 rank's: the projections together, one weight alone, routed experts, rows sorted already."""
    x = SHAPE((tokens, 6144), jnp.bfloat16)
    texts = [
        lowered("matmul", x, (mxfp8(6144, 1024), *[mxfp8(6144, 128)] * 4)),
        lowered("matmul", SHAPE((tokens, 384), jnp.bfloat16), mxfp8(384, 6144), dtype=jnp.float32),
        lowered("grouped_matmul", x, mxfp8(16, 6144, 6144), SHAPE((16,), jnp.int32)),
    ]
    # the sum of the projections, whose inputs are split; with very many rows weights are multiplied by halves
    assert [text.count(KERNEL) for text in texts] == ([2, 1, 1] if tokens < 8192 else [4, 2, 1])


def test_several_arrays_and_few_rows_are_one_product():
    x, weights = SHAPE((8, 6144), jnp.bfloat16), tuple(SHAPE((6144, n), jnp.bfloat16) for n in (1024, 128, 128))
    assert lowered("matmul", x, weights).count(KERNEL) == 2, "the product, and the sum of its splits"


@pytest.mark.parametrize("tokens", [1, 33, 300, 8192])
@pytest.mark.parametrize("quantised", [True, False])
def test_routed_experts_lower(tokens, quantised):
    def weight(*shape):
        return mxfp8(*shape) if quantised else SHAPE(shape, jnp.bfloat16)

    ids, weights = SHAPE((tokens, 4), jnp.int32), SHAPE((tokens, 4), jnp.float32)
    x, activation = SHAPE((tokens, 6144), jnp.bfloat16), mk.Swiglu(1.702, 1.0, 7.0)
    gate_up, down = weight(16, 6144, 6144), weight(16, 3072, 6144)
    text = lowered("routed_experts", x, ids, weights, gate_up, down, activation=activation, num_experts=128)
    sorting = 1 if tokens * 4 <= 512 else 2
    joining = 1 if tokens == 1 else 0  # of [gate | up], where the inputs are split
    assert text.count(KERNEL) == 3 + sorting + joining, "[gate | up], down and the weighted sum"


def test_norms_and_routers_lower():
    x, f32 = SHAPE((77, 6144), jnp.bfloat16), jnp.float32
    assert KERNEL in lowered("add_norm", x, x, SHAPE((6144,), jnp.bfloat16), eps=1e-6)
    assert KERNEL in lowered("choose_experts", SHAPE((77, 128), f32), SHAPE((128,), f32), num_chosen=4, scale=2.0)
    router = SHAPE((7, 6144), jnp.bfloat16), SHAPE((6144, 128), f32), SHAPE((128,), f32)
    assert lowered("route_tokens", *router, num_chosen=4).count(KERNEL) == 2, "partial logits and the choice"


@pytest.mark.parametrize(("vocab_size", "launches"), [(300, 1), (25_008, 2), (200_064, 2)])
def test_sampling_lowers(vocab_size, launches):
    rows = [SHAPE((64,), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
    text = lowered("sampling_cut", SHAPE((64, vocab_size), jnp.float32), *rows)
    assert text.count(KERNEL) == launches and "stablehlo.sort" not in text and "chlo.top_k" not in text
