"""Kernels of a layer around attention against their references, on the device that is there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import minimax_kernels as mk
from benchmarks.products.cases import EXPERT_WIDTH, EXPERTS, HIDDEN, LOCAL, PER_TOKEN
from benchmarks.products.weights import random_mxfp8

TOKENS = (1, 7, 64, 300)
ACTIVATION = mk.Swiglu(1.702, 1.0, 7.0)
ROUNDING = 2**-6  # of bfloat16 results whose sums were in different orders


def check_layer_ops(impl: str, shrink: int, say: Callable[[str], None]) -> list[str]:
    """Compares; a line for each failure."""
    failures = []
    for name, check in (
        ("e4m3 bytes", _bytes), ("add_norm", _add_norm), ("choose_experts", _choose), ("routed_experts", _experts),
    ):  # fmt: skip
        found = check(impl, shrink)
        say(f"{name}: {'; '.join(found) or 'equal'}")
        failures += [f"{name}: {line}" for line in found]
    return failures


def _bytes(impl: str, shrink: int) -> list[str]:
    """Each byte that is no NaN under each scale, bit by bit; `shrink` leaves out scales."""
    data = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    scales = np.arange(0, 256, shrink, dtype=np.uint8)
    row = np.repeat(data[None], len(scales), axis=0).reshape(-1)
    values = np.zeros((32, row.size), np.uint8)
    values[0] = row
    columns = row.size - row.size % 16
    weight = mk.Mxfp8(
        jnp.asarray(values[:, :columns]).view(jnp.float8_e4m3fn),
        jnp.asarray(np.repeat(scales, data.size)[None, :columns]),
    )
    x = jnp.zeros((1, 32), jnp.bfloat16).at[0, 0].set(1)
    found, expected = (np.asarray(_run("matmul", which, dtype=jnp.float32)(x, weight)) for which in (impl, "reference"))
    exact = (found == expected) | (np.isnan(found) & np.isnan(expected))
    subnormal = np.abs(expected) < np.finfo(np.float32).tiny  # of bfloat16 too; XLA may take them for zeros
    wrong = ~exact & (~subnormal | (found != 0))
    return [f"{int(wrong.sum())} of {exact.size} differ"] if wrong.any() else []


def _add_norm(impl: str, shrink: int) -> list[str]:
    lines = []
    for tokens in TOKENS:
        keys = jax.random.split(jax.random.key(tokens), 3)
        x, update = (jax.random.normal(key, (tokens, HIDDEN // shrink), jnp.bfloat16) for key in keys[:2])
        weight = jax.random.normal(keys[2], x.shape[1:], jnp.bfloat16)
        found, expected = (_run("add_norm", which, eps=1e-6)(x, update, weight) for which in (impl, "reference"))
        if not (found[0] == expected[0]).all() or _error(found[1], expected[1]) > ROUNDING:
            lines.append(f"{tokens} tokens differ by {_error(found[1], expected[1]):.3g}")
    return lines


def _choose(impl: str, shrink: int) -> list[str]:
    lines = []
    for tokens in TOKENS:
        logits = jax.random.normal(jax.random.key(tokens), (tokens, EXPERTS))
        logits = logits.at[:, ::3].set(
            logits[:, 1::3][:, : logits[:, ::3].shape[1]].mean(axis=1, keepdims=True)
        )  # ties
        bias = jnp.linspace(-0.2, 0.2, EXPERTS)
        options = {"num_chosen": PER_TOKEN, "scale": 2.0}
        found, expected = (_run("choose_experts", which, **options)(logits, bias) for which in (impl, "reference"))
        # sigmoids of different libraries differ in the last place, and a choice between equals may turn with them
        same = (found[0] == expected[0]).all(axis=1)
        if float(same.mean()) < 0.99 or _error(found[1][same], expected[1][same]) > 1e-4:
            lines.append(f"{tokens} tokens: {int((~same).sum())} choices differ")
    return lines


def _experts(impl: str, shrink: int) -> list[str]:
    lines = []
    hidden, width = HIDDEN // shrink, EXPERT_WIDTH // shrink
    keys = jax.random.split(jax.random.key(1), 3)
    gate_up, down = random_mxfp8(keys[0], (LOCAL, hidden, 2 * width)), random_mxfp8(keys[1], (LOCAL, width, hidden))
    options = {"activation": ACTIVATION, "num_experts": EXPERTS}
    for tokens in TOKENS if shrink == 1 else TOKENS[:2]:
        x = jax.random.normal(keys[2], (tokens, hidden), jnp.bfloat16)
        random = np.random.default_rng(tokens)
        ids = np.argsort(random.random((tokens, EXPERTS)), axis=1)[:, :PER_TOKEN].astype(np.int32)
        weights = random.random(ids.shape).astype(np.float32)
        for kind, own in {
            "spread": ids, "all here": ids % LOCAL, "one expert": np.full_like(ids, 3), "elsewhere": ids + LOCAL,
        }.items():  # fmt: skip
            args = (x, own, weights, gate_up, down)
            found, expected = (_run("routed_experts", which, **options)(*args) for which in (impl, "reference"))
            if not _error(found, expected) <= ROUNDING:
                lines.append(f"{tokens} tokens, {kind}: differ by {_error(found, expected):.3g}")
    return lines


@functools.cache
def _run(op: str, impl: str, **options: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(getattr(mk, op), impl=impl, **options))


def _error(found: jax.Array, expected: jax.Array) -> float:
    """The largest difference, in what is expected plus its spread."""
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    scale = jnp.abs(expected) + jnp.maximum(jnp.std(expected), 1e-3)
    return float(jnp.max(jnp.abs(found - expected) / scale, initial=0))
