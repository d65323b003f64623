"""What the operations refuse, and how an implementation is chosen."""

from __future__ import annotations

import dataclasses
import functools
import gc
import types
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minimax_kernels as mk
from minimax_kernels.cache_types import FP8
from minimax_kernels.implementation import dispatch

BATCH = mk.Batch(jnp.zeros((2, 3), jnp.int32), jnp.array([0, 2, 5]), jnp.array([20, 48]))
SWIGLU = mk.Swiglu(1.7, 1.0, 7.0)
ARGS = {
    "dense_attention": {
        "q": jnp.zeros((5, 4, 8)), "k_cache": jnp.zeros((6, 2, 16, 8)), "v_cache": jnp.zeros((6, 2, 16, 8)),
        "batch": BATCH, "scale": 1.0,
    },
    "index_score": {"idx_q": jnp.zeros((5, 2, 8)), "index_cache": jnp.zeros((6, 16, 8)), "batch": BATCH},
    "select_blocks": {"scores": jnp.zeros((2, 5, 3)), "batch": BATCH, "topk": 2},
    "grouped_matmul": {"x": jnp.zeros((5, 32)), "w": jnp.zeros((3, 32, 4)), "group_sizes": jnp.array([1, 2, 0])},
    "add_norm": {"x": jnp.zeros((5, 32)), "update": jnp.zeros((5, 32)), "weight": jnp.zeros(32), "eps": 1e-6},
    "choose_experts": {"logits": jnp.zeros((5, 8)), "bias": jnp.zeros(8), "num_chosen": 2},
    "route_tokens": {"x": jnp.zeros((5, 32)), "weight": jnp.zeros((32, 8)), "bias": jnp.zeros(8), "num_chosen": 2},
    "matmul": {"x": jnp.zeros((5, 32)), "w": jnp.zeros((32, 4))},
    "routed_experts": {
        "x": jnp.zeros((5, 32)), "expert_ids": jnp.zeros((5, 2), jnp.int32), "weights": jnp.zeros((5, 2)),
        "gate_up": jnp.zeros((3, 32, 8)), "down": jnp.zeros((3, 4, 32)), "activation": SWIGLU,
    },
    "sampling_cut": {
        "scaled": jnp.zeros((5, 8)), "top_k": jnp.ones(5, jnp.int32), "top_p": jnp.ones(5), "min_p": jnp.zeros(5),
    },
    "write_index": {
        "index_cache": jnp.zeros((6, 16, 8)), "idx_k": jnp.zeros((5, 8)), "slots": jnp.arange(5, dtype=jnp.int32),
    },
    "write_kv": {
        "k_cache": jnp.zeros((6, 2, 16, 8)), "v_cache": jnp.zeros((6, 2, 16, 8)), "k": jnp.zeros((5, 2, 8)),
        "v": jnp.zeros((5, 2, 8)), "slots": jnp.arange(5, dtype=jnp.int32),
    },
}  # fmt: skip
ARGS["write_kv_index"] = ARGS["write_kv"] | ARGS["write_index"]
ARGS["sparse_attention"] = ARGS["dense_attention"] | {"selected": jnp.zeros((2, 5, 1), jnp.int32)}
ARGS["msa"] = ARGS["dense_attention"] | {
    "idx_q": jnp.zeros((5, 2, 8)), "index_cache": jnp.zeros((6, 16, 8)), "topk": 2
}  # fmt: skip


def quantised(*shape, scale_rows=None, lead=None):
    *own, inputs, outputs = shape
    scales = (*(own if lead is None else lead), outputs, scale_rows or inputs // 32)
    return mk.Mxfp8(jnp.zeros((*own, outputs, inputs), jnp.float8_e4m3fn), jnp.full(scales, 127, jnp.uint8))


def batch_with(**changes):
    return dataclasses.replace(BATCH, **changes)


_ATTENTION_ERRORS = [
    ({"q": jnp.zeros((5, 32))}, r"q has shape \(5, 32\): must be \[T, Hq, D\]"),
    ({"q": jnp.zeros((5, 4, 8), jnp.int32)}, "q is int32: must be one of float32, bfloat16"),
    ({"q": jnp.zeros((5, 4, 16))}, "q has D = 16: must be 8, as in k_cache"),
    ({"q": jnp.zeros((5, 3, 8))}, "q's Hq = 3: must be a multiple of k_cache's Hkv = 2"),
    ({"k_cache": jnp.zeros((6, 16, 8))}, r"k_cache has shape \(6, 16, 8\): must be \[P, Hkv, B, D\]"),
    ({"v_cache": jnp.zeros((5, 2, 16, 8))}, r"v_cache has shape \(5, 2, 16, 8\): must be \(6, 2, 16, 8\)"),
    ({"k_cache": jnp.zeros((6, 2, 16, 8), jnp.int8)}, "k_cache is int8: must be one of .*float8_e4m3fn"),
    ({"v_cache": jnp.zeros((6, 2, 16, 8), FP8)}, "v_cache is float8_e4m3fn: must be float32, as k_cache"),
    ({"q": jnp.zeros((5, 4, 8), FP8)}, "q is float8_e4m3fn: must be one of float32, bfloat16, float16"),
    ({"out": jnp.zeros((4, 4, 8))}, r"out has shape \(4, 4, 8\): must be \(5, 4, 8\), as q"),
    ({"out": jnp.zeros((5, 4, 8), jnp.int32)}, "out is int32: must be one of"),
]
_BATCH_ERRORS = [
    ({"batch": (1, 2, 3)}, "batch is tuple: must be a minimax_kernels.Batch"),
    ({"batch": batch_with(block_tables=jnp.zeros(3, jnp.int32))}, r"batch.block_tables has shape \(3,\)"),
    ({"batch": batch_with(block_tables=jnp.zeros((2, 3)))}, "batch.block_tables is float32: must be an integer"),
    ({"batch": batch_with(block_tables=jnp.zeros((3, 3), jnp.int32))}, "batch.block_tables has R = 3: must be 2"),
    (
        {"batch": batch_with(block_tables=jnp.zeros((2, 2), jnp.int32))},
        "batch.kv_lens has 48 tokens: must be at most 32",
    ),
    ({"batch": batch_with(query_starts=jnp.array([0, 5]))}, r"batch.query_starts has R \+ 1 = 2: must be 3"),
    ({"batch": batch_with(kv_lens=jnp.zeros((2, 1), jnp.int32))}, r"batch.kv_lens has shape \(2, 1\): must be \[R\]"),
    ({"batch": batch_with(kv_lens=jnp.array([1.0, 2.0]))}, "batch.kv_lens is float32: must be an integer"),
]
_OPTION_ERRORS = [
    ({"topk": 0}, "topk = 0: must be an integer >= 1"),
    ({"topk": 1.5}, "topk = 1.5: must be an integer"),
    ({"init_blocks": -1}, "init_blocks = -1: must be an integer >= 0"),
    ({"local_blocks": -1}, "local_blocks = -1: must be an integer >= 0"),
    ({"init_blocks": 1, "local_blocks": 2}, r"topk = 2: must be at least init_blocks \+ local_blocks = 3"),
]
_INDEX_ERRORS = [
    ({"idx_q": jnp.zeros((5, 8))}, r"idx_q has shape \(5, 8\): must be \[T, Hi, D"),
    ({"idx_q": jnp.zeros((5, 2, 8), jnp.int8)}, "idx_q is int8: must be one of"),
    ({"idx_q": jnp.zeros((5, 2, 4))}, "idx_q has Di? = 4: must be 8, as in index_cache"),
    ({"index_cache": jnp.zeros((6, 2, 16, 8))}, r"index_cache has shape \(6, 2, 16, 8\): must be \[P, B, D"),
    (
        {"index_cache": jnp.zeros((6, 16, 8), "float8_e5m2")},
        "index_cache is float8_e5m2: must be one of .*e4m3fn",
    ),
]
ERRORS = {
    "dense_attention": _ATTENTION_ERRORS + _BATCH_ERRORS,
    "sparse_attention": [
        *_ATTENTION_ERRORS, *_BATCH_ERRORS,
        ({"selected": jnp.zeros((2, 5), jnp.int32)}, r"selected has shape \(2, 5\): must be \[Hkv, T, topk\]"),
        ({"selected": jnp.zeros((2, 5, 1))}, "selected is float32: must be an integer type"),
        ({"selected": jnp.zeros((2, 4, 1), jnp.int32)}, "selected has T = 4: must be 5, as in q"),
        ({"selected": jnp.zeros((2, 5, 0), jnp.int32)}, "selected's topk = 0: must be an integer >= 1"),
        ({"selected": jnp.zeros((3, 5, 1), jnp.int32)}, "selected's Hkv = 3: must be a multiple of k_cache's Hkv = 2"),
        ({"selected": jnp.zeros((8, 5, 1), jnp.int32)}, "q's Hq = 4: must be a multiple of selected's Hkv = 8"),
    ],
    "index_score": _INDEX_ERRORS + _BATCH_ERRORS,
    "select_blocks": [
        *_OPTION_ERRORS,
        ({"scores": jnp.zeros((5, 3))}, r"scores has shape \(5, 3\): must be \[Hi, T, N\]"),
        ({"scores": jnp.zeros((2, 5, 3), jnp.int32)}, "scores is int32: must be one of"),
        ({"scores": jnp.zeros((2, 5, 4))}, "scores has N = 4: must be 3, as in batch.block_tables"),
    ],
    "msa": [
        *_ATTENTION_ERRORS, *_BATCH_ERRORS, *_OPTION_ERRORS, *_INDEX_ERRORS,
        ({"idx_q": jnp.zeros((4, 2, 8))}, "idx_q has T = 4: must be 5, as in q"),
        ({"index_cache": jnp.zeros((6, 32, 8))}, "index_cache has B = 32: must be 16, as in k_cache"),
        ({"idx_q": jnp.zeros((5, 3, 8))}, "idx_q's Hi = 3: must divide k_cache's Hkv = 2, or be a multiple"),
        ({"idx_q": jnp.zeros((5, 8, 8))}, "q's Hq = 4: must be a multiple of idx_q's Hi = 8"),
    ],
    "grouped_matmul": [
        ({"x": jnp.zeros((5, 1, 32))}, r"x has shape \(5, 1, 32\): must be \[T, K\]"),
        ({"x": jnp.zeros((5, 32), jnp.int32)}, "x is int32: must be one of"),
        ({"w": jnp.zeros((32, 4))}, r"w has shape \(32, 4\): must be \[E, K, N\]"),
        ({"w": jnp.zeros((3, 16, 4))}, "x has K = 32: must be 16, as in w"),
        ({"w": quantised(3, 32, 4, lead=())}, r"w has scales \(4, 1\) for values \(3, 4, 32\): must be"),
        ({"group_sizes": jnp.zeros(3)}, "group_sizes is float32: must be an integer type"),
        ({"group_sizes": jnp.zeros((3, 1), jnp.int32)}, r"group_sizes has shape \(3, 1\): must be \[E\]"),
        ({"group_sizes": jnp.zeros(2, jnp.int32)}, "group_sizes has E = 2: must be 3, as in w"),
    ],
    "add_norm": [
        ({"x": jnp.zeros((5, 1, 32))}, r"x has shape \(5, 1, 32\): must be \[T, H\]"),
        ({"update": jnp.zeros((4, 32))}, r"update is float32 of shape \(4, 32\): must be float32 of \(5, 32\), as x"),
        ({"update": jnp.zeros((5, 32), jnp.bfloat16)}, "update is bfloat16 of shape"),
        ({"weight": jnp.zeros(16)}, "weight has H = 16: must be 32, as in x"),
    ],
    "choose_experts": [
        ({"logits": jnp.zeros((5, 8), jnp.bfloat16)}, "logits is bfloat16: must be float32"),
        ({"bias": jnp.zeros(4)}, "bias has E = 4: must be 8, as in logits"),
        ({"num_chosen": 0}, "num_chosen = 0: must be an integer >= 1"),
        ({"num_chosen": 9}, "num_chosen = 9: must be at most logits' E = 8"),
    ],
    "sampling_cut": [
        ({"scaled": jnp.zeros(8)}, r"scaled has shape \(8,\): must be \[R, V\]"),
        ({"scaled": jnp.zeros((5, 8), jnp.bfloat16)}, "scaled is bfloat16: must be float32"),
        ({"top_k": jnp.ones(5)}, "top_k is float32: must be int32"),
        ({"top_p": jnp.ones(4)}, "top_p has R = 4: must be 5, as in scaled"),
        ({"candidates": 0}, "candidates = 0: must be an integer >= 1"),
        ({"scaled": jnp.zeros((5, 0))}, "scaled's V = 0: must be an integer >= 1"),
    ],
    "route_tokens": [
        ({"x": jnp.zeros((5, 32), jnp.int32)}, "x is int32: must be one of"),
        ({"weight": jnp.zeros((16, 8))}, "weight has H = 16: must be 32, as in x"),
        ({"weight": jnp.zeros((32, 8), jnp.bfloat16)}, "weight is bfloat16: must be float32"),
        ({"bias": jnp.zeros(4)}, "bias has E = 4: must be 8, as in weight"),
        ({"num_chosen": 9}, "num_chosen = 9: must be at most weight's E = 8"),
    ],
    "matmul": [
        ({"x": jnp.zeros((5, 1, 32))}, r"x has shape \(5, 1, 32\): must be \[T, K\]"),
        ({"x": jnp.zeros((5, 32), jnp.int32)}, "x is int32: must be one of"),
        ({"w": jnp.zeros((3, 32, 4))}, r"w has shape \(3, 32, 4\): must be \[K, N\]"),
        ({"w": jnp.zeros((32, 4), jnp.int8)}, "w is int8: must be one of"),
        ({"w": (jnp.zeros((32, 4)), jnp.zeros((16, 4)))}, r"x has K = 32: must be 16, as in w\[1\]"),
        ({"w": (jnp.zeros((32, 4)),), "activation": SWIGLU}, "activation: must be None where w is a tuple"),
        ({"w": jnp.zeros((32, 3)), "activation": SWIGLU}, "w's last axis = 3: must be a multiple of the number of hal"),
        ({"w": ()}, r"w = \(\): must be a weight or at least one of them"),
        ({"w": mk.Mxfp8(jnp.zeros((4, 32)), jnp.zeros((4, 1)))}, "w is Mxfp8 of float32 and float32: must be float8"),
        ({"w": quantised(32, 4, scale_rows=2)}, r"w has scales \(4, 2\) for values \(4, 32\): must be"),
    ],
    "routed_experts": [
        ({"x": jnp.zeros((5, 1, 32))}, r"x has shape \(5, 1, 32\): must be \[T, H\]"),
        ({"expert_ids": jnp.zeros((5, 2))}, "expert_ids is float32: must be an integer type"),
        ({"expert_ids": jnp.zeros((4, 2), jnp.int32)}, "expert_ids has T = 4: must be 5, as in x"),
        ({"weights": jnp.zeros((5, 3))}, r"weights is float32 of shape \(5, 3\): must be floating, of expert_ids'"),
        ({"addend": jnp.zeros((4, 32))}, r"addend is float32 of shape \(4, 32\): must be float32 of \(5, 32\), as x"),
        ({"num_experts": 0}, "num_experts = 0: must be an integer >= 1"),
        ({"first_expert": 0.5}, r"first_expert is float32 of shape \(\): must be one integer"),
        ({"first_expert": jnp.arange(2)}, r"first_expert is int32 of shape \(2,\): must be one integer"),
        ({"gate_up": jnp.zeros((3, 16, 8))}, "gate_up has H = 16: must be 32, as in x"),
        ({"gate_up": jnp.zeros((3, 32, 7))}, "gate_up's last axis = 7: must be a multiple of the number of halves"),
        ({"down": jnp.zeros((2, 4, 32))}, "down has E = 2: must be 3, as in gate_up"),
        ({"down": jnp.zeros((3, 8, 32))}, "down has F = 8: must be 4, as half of gate_up's last axis"),
        ({"down": jnp.zeros((3, 4, 16))}, "down has H = 16: must be 32, as in x"),
    ],
    "write_kv": [
        ({"k_cache": jnp.zeros((6, 16, 8))}, "k_cache has shape"),
        ({"k_cache": jnp.zeros((6, 2, 16, 8), jnp.int8)}, "k_cache is int8: must be one of .*float8_e4m3fn"),
        ({"v_cache": jnp.zeros((6, 2, 16, 8), FP8)}, "v_cache is float8_e4m3fn: must be float32, as k_cache"),
        ({"v_cache": jnp.zeros((6, 2, 16, 4))}, r"v_cache has shape \(6, 2, 16, 4\): must be \(6, 2, 16, 8\)"),
        ({"k": jnp.zeros((5, 16))}, r"k has shape \(5, 16\): must be \[T, Hkv, D\]"),
        ({"v": jnp.zeros((5, 2, 4))}, r"v has shape \(5, 2, 4\): must be \(5, 2, 8\), as k"),
        ({"k": jnp.zeros((5, 4, 8)), "v": jnp.zeros((5, 4, 8))}, "k has Hkv = 4: must be 2, as in k_cache"),
        ({"k": jnp.zeros((5, 2, 4)), "v": jnp.zeros((5, 2, 4))}, "k has D = 4: must be 8, as in k_cache"),
        ({"slots": jnp.zeros((5, 1), jnp.int32)}, r"slots has shape \(5, 1\): must be \[T\]"),
        ({"slots": jnp.zeros(5)}, "slots is float32: must be an integer type"),
        ({"slots": jnp.zeros(4, jnp.int32)}, "slots has T = 4: must be 5, as in k"),
    ],
    "write_index": [
        ({"index_cache": jnp.zeros((6, 8))}, r"index_cache has shape \(6, 8\): must be \[P, B, D\]"),
        ({"index_cache": jnp.zeros((6, 16, 8), jnp.int8)}, "index_cache is int8: must be one of .*float8_e4m3fn"),
        ({"idx_k": jnp.zeros((5, 2, 8))}, r"idx_k has shape \(5, 2, 8\): must be \[T, D\]"),
        ({"idx_k": jnp.zeros((5, 4))}, "idx_k has D = 4: must be 8, as in index_cache"),
        ({"slots": jnp.zeros(5)}, "slots is float32: must be an integer type"),
        ({"slots": jnp.zeros(4, jnp.int32)}, "slots has T = 4: must be 5, as in idx_k"),
    ],
}  # fmt: skip
ERRORS["write_kv_index"] = ERRORS["write_kv"] + ERRORS["write_index"][:-2]
ERRORS["write_kv_index"].append(
    ({"index_cache": jnp.zeros((6, 32, 8))}, "index_cache has B = 32: must be 16, as in k_")
)


@pytest.mark.parametrize("op", ARGS)
def test_argument_errors_name_the_argument(op):
    getattr(mk, op)(**ARGS[op])  # what the errors below change one thing of
    for changes, message in ERRORS[op]:
        with pytest.raises(ValueError, match=message):
            getattr(mk, op)(**ARGS[op] | changes)


@pytest.mark.parametrize("op", ARGS)
def test_unknown_implementation(op):
    getattr(mk, op)(**ARGS[op], impl="reference")
    with pytest.raises(ValueError, match=rf"impl = 'quick': {op} has .*'reference'"):
        getattr(mk, op)(**ARGS[op], impl="quick")


def refuse(*args, **kwargs):
    raise NotImplementedError("not for this head count")


def twice(x, *, scale=1.0, out=None):
    return 2.0 * scale * x if out is None else out + 2.0 * scale * x


def thrice(x, *, scale=1.0, out=None):
    return 3.0 * scale * x if out is None else out + 3.0 * scale * x


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The choice that is made where JAX's default device is a GPU; arrays still live on the CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_without_a_gpu_the_reference_serves_and_nothing_warns():
    implementations = {"pallas_triton": refuse, "reference": twice}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch("op", implementations, None, jnp.ones(2), scale=2.0).tolist() == [4.0, 4.0]
        assert dispatch("op", implementations, "reference", jnp.ones(2)).tolist() == [2.0, 2.0]


def test_with_a_gpu_arrays_on_the_cpu_take_the_reference(on_a_gpu):
    """Decided when the call is lowered, eagerly and under jit, with array keywords."""
    implementations = {"pallas_triton": thrice, "reference": twice}
    call = functools.partial(dispatch, "op", implementations, None, scale=2.0)
    assert call(jnp.ones(2)).tolist() == [4.0, 4.0]
    assert jax.jit(call)(jnp.ones(2), out=jnp.ones(2)).tolist() == [5.0, 5.0]


def test_lowered_for_cuda_the_kernel_is_chosen(on_a_gpu):
    """The two differ in an operation that only one of them has."""
    implementations = {"pallas_triton": lambda x: jnp.sin(x), "reference": lambda x: jnp.cos(x)}
    traced = jax.jit(functools.partial(dispatch, "op", implementations, None)).trace(jnp.ones(2))
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu")}
    assert "sine" in texts["cuda"] and "cosine" not in texts["cuda"]
    assert "cosine" in texts["cpu"]


def test_equal_calls_of_a_program_are_traced_and_lowered_once(on_a_gpu):
    """As those of sixty layers are, of which each would take half a second; other shapes and options are others."""
    traced = []

    def best(x, *, scale):
        traced.append((x.shape, scale))
        return jnp.sin(x) * scale

    implementations = {"pallas_triton": best, "reference": twice}

    def layers(x, scales):
        for scale in scales:
            x = dispatch("op", implementations, None, x, scale=scale)
        return x

    program = jax.jit(functools.partial(layers, scales=(2.0,) * 5 + (3.0,) * 5)).trace(jnp.ones(2))
    assert traced == [((2,), 2.0), ((2,), 3.0)]
    assert program.lower(lowering_platforms=("cuda",)).as_text().count("sine") == 2
    jax.jit(functools.partial(layers, scales=(2.0, 2.0))).trace(jnp.ones(3))
    assert traced[2:] == [((3,), 2.0)]


def test_with_a_gpu_a_refusal_falls_back_with_one_warning(on_a_gpu):
    implementations = {"pallas_triton": refuse, "reference": twice}
    with pytest.warns(UserWarning, match="op falls back to 'reference'") as caught:
        assert dispatch("op", implementations, None, jnp.ones(1)).tolist() == [2.0]
    assert len(caught) == 1
    assert "not for this head count" in str(caught[0].message)


def test_the_fastest_that_can_serve_is_taken_and_others_refuse_in_silence(on_a_gpu, monkeypatch):
    implementations = {"pallas_mosaic_gpu": jnp.sin, "pallas_triton": jnp.tan, "reference": jnp.cos}
    best = ("pallas_mosaic_gpu", "pallas_triton")

    def chosen(capability):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda: [device])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            traced = jax.jit(functools.partial(dispatch, "op", implementations, None, best=best)).trace(jnp.ones(2))
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    assert "stablehlo.sine" in chosen("9.0")
    assert all("stablehlo.tan" in chosen(capability) for capability in ("8.0", "10.0", None))
    implementations["pallas_mosaic_gpu"] = refuse
    assert "stablehlo.tan" in chosen("9.0")


def test_a_refusal_keeps_no_operand_alive(on_a_gpu, monkeypatch):
    device = types.SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    implementations = {"pallas_mosaic_gpu": twice, "pallas_triton": twice, "reference": twice}
    x = jnp.ones(3)
    gone = weakref.ref(x)
    gc.disable()
    try:
        dispatch("op", implementations, None, x, best=("pallas_mosaic_gpu", "pallas_triton"))
        del x
        assert gone() is None
    finally:
        gc.enable()


def test_a_named_implementation_that_cannot_serve_raises():
    with pytest.raises(NotImplementedError, match="not for this head count"):
        dispatch("op", {"pallas_triton": refuse, "reference": twice}, "pallas_triton", jnp.ones(1))


def test_dispatch_does_not_swallow_other_errors(on_a_gpu):
    def broken(*args):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        dispatch("op", {"pallas_triton": broken, "reference": twice}, None, jnp.ones(1))


@pytest.mark.parametrize("op", ["index_score", "sparse_attention", "dense_attention", "msa"])
def test_kernels_refuse_what_they_cannot_serve(op):
    """float32 on a GPU (matrix instructions would round it), and pages that are no power of two."""
    with pytest.raises(NotImplementedError, match="float32 is not one of bfloat16, float16"):
        getattr(mk, op)(**ARGS[op], impl="pallas_triton")
    with pytest.raises(NotImplementedError, match="head_dim = 8 is not a power of two from 16"):
        getattr(mk, op)(**ARGS[op], impl="pallas_triton_interpret")


@pytest.mark.parametrize("impl", [None, "reference", "pallas_triton_interpret"])
def test_nothing_to_do(impl):
    """No requests, no tokens, no blocks: nothing is launched, and `out` keeps what it holds."""
    none = mk.Batch(jnp.zeros((0, 3), jnp.int32), jnp.array([0]), jnp.zeros(0, jnp.int32))
    no_blocks = mk.Batch(jnp.zeros((1, 0), jnp.int32), jnp.array([0, 0]), jnp.array([0]))
    caches = (jnp.ones((2, 2, 16, 16)), jnp.ones((2, 2, 16, 16)))
    for tokens, batch in ((4, none), (4, no_blocks), (0, dataclasses.replace(none))):
        q, idx_q, index = jnp.ones((tokens, 4, 16)), jnp.ones((tokens, 2, 16)), jnp.ones((2, 16, 16))
        out = jnp.full_like(q, 7.0)
        assert not mk.dense_attention(q, *caches, batch, scale=1.0, impl=impl).any()
        assert (mk.dense_attention(q, *caches, batch, scale=1.0, out=out, impl=impl) == 7).all()
        scores = mk.index_score(idx_q, index, batch, impl=impl)
        assert scores.shape == (2, tokens, batch.num_blocks) and (scores == -jnp.inf).all()
        selected = mk.select_blocks(scores, batch, topk=3, impl=impl)
        assert selected.shape == (2, tokens, 3) and (selected == -1).all()
        assert not mk.sparse_attention(q, *caches, selected, batch, scale=1.0, impl=impl).any()
        assert (mk.msa(q, *caches, idx_q, index, batch, scale=1.0, topk=3, out=out, impl=impl) == 7).all()


@pytest.mark.parametrize("op", ["dense_attention", "sparse_attention", "msa"])
def test_scale_is_a_positive_number(op, on_a_gpu):
    """NumPy and JAX numbers are taken, with a GPU too, where they once became traced values."""
    results = []
    for scale in (0.5, np.float32(0.5), jnp.float32(0.5)):
        with pytest.warns(UserWarning, match="falls back to 'reference'"):  # float32
            results.append(np.asarray(getattr(mk, op)(**ARGS[op] | {"scale": scale})))
    assert (results[1] == results[0]).all() and (results[2] == results[0]).all()
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale = .*: must be a positive number"):
            getattr(mk, op)(**ARGS[op] | {"scale": wrong})
    with pytest.raises(ValueError, match="scale is a traced value"):
        jax.jit(lambda scale: getattr(mk, op)(**ARGS[op] | {"scale": scale}))(0.5)


def test_integers_of_numpy_are_integers():
    assert mk.select_blocks(**ARGS["select_blocks"] | {"topk": np.int64(2)}).shape == (2, 5, 2)
    with pytest.raises(ValueError, match=r"batch is tuple: must be a minimax_kernels\.Batch"):
        mk.select_blocks(jnp.zeros((2, 5, 3)), (1, 2, 3), topk=2)
