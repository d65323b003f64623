"""Kernels of a layer around attention against their references, on the device that is there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import minimax_kernels as mk
from benchmarks.products.cases import EXPERT_WIDTH, EXPERTS, HIDDEN, LOCAL, PER_TOKEN
from benchmarks.products.errors import measure_errors, reference_and_truth
from benchmarks.products.weights import random_mxfp8

TOKENS = (1, 7, 64, 300)
ACTIVATION = mk.Swiglu(1.702, 1.0, 7.0)


def check_layer_ops(impl: str, shrink: int, say: Callable[[str], None], mosaic: str = "") -> list[str]:
    """Compares; a line for each failure.

    Args:
      mosaic: another implementation for experts, of many rows only as each shape takes seconds to compile; none if
        empty.
    """
    failures = []
    for name, check, own in (
        ("e4m3 bytes", _bytes, impl), ("add_norm", _add_norm, impl), ("choose_experts", _choose, impl),
        ("route_tokens", _route, impl), ("routed_experts", _experts, impl),
        ("e4m3 bytes on Mosaic GPU", _grouped_bytes, mosaic),
        ("routed_experts on Mosaic GPU", functools.partial(_experts, counts=TOKENS[-1:]), mosaic),
    ):  # fmt: skip
        if not own:
            continue
        found = check(own, shrink)
        say(f"{name}: {'; '.join(found) or 'equal'}")
        failures += [f"{name}: {line}" for line in found]
    return failures


def _bytes(impl: str, shrink: int) -> list[str]:
    """Each byte that is no NaN under each scale, bit by bit; `shrink` leaves out scales."""
    data = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    scales = np.arange(0, 256, shrink, dtype=np.uint8)
    row, own_scale = np.tile(data, len(scales)), np.repeat(scales, data.size)
    values = np.zeros((row.size, 32), np.uint8)
    values[:, 0] = row
    columns = row.size - row.size % 16
    weight = mk.Mxfp8(jnp.asarray(values[:columns]).view(jnp.float8_e4m3fn), jnp.asarray(own_scale[:columns, None]))
    x = jnp.zeros((1, 32), jnp.bfloat16).at[0, 0].set(1)
    found = np.asarray(_run("matmul", impl, dtype=jnp.float32)(x, weight))[0]
    wrong = wrong_bytes(found, row[:columns], own_scale[:columns], flushes=jax.default_backend() == "cpu")
    return [f"{int(wrong.sum())} of {columns} differ"] if wrong.any() else []


def _grouped_bytes(impl: str, shrink: int) -> list[str]:
    """The same at every place among 128 inputs, of which all others are zeros."""
    data = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    row, own_scale = np.tile(data, 256 // shrink), np.repeat(np.arange(0, 256, shrink, dtype=np.uint8), data.size)
    column, at = np.arange(row.size), np.random.default_rng(0).integers(0, 128, row.size)
    values, scales = np.zeros((1, row.size, 128), np.uint8), np.full((1, row.size, 4), 127, np.uint8)
    values[0, column, at], scales[0, column, at // 32] = row, own_scale
    weight = mk.Mxfp8.from_rows(jnp.asarray(values).view(jnp.float8_e4m3fn), jnp.asarray(scales))
    found = _run("grouped_matmul", impl)(jnp.ones((1, 128), jnp.bfloat16), weight, jnp.ones(1, jnp.int32))
    wrong = wrong_bytes(np.asarray(found, np.float32)[0], row, own_scale, flushes=jax.default_backend() == "cpu")
    return [f"{int(wrong.sum())} of {row.size} differ"] if wrong.any() else []


def exact_bytes(data: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 of e4m3 bytes times 2 ** (scale - 127), rounded once to bfloat16: nearest, ties to even, subnormals too.

    Computed on the host: XLA for GPUs may leave the rounding out (`xla_allow_excess_precision`), for CPUs flushes.
    """
    # four significant bits, so a float32 holds every product that is below its range's end
    with np.errstate(over="ignore"):
        product = np.ldexp(data.view(ml_dtypes.float8_e4m3fn).astype(np.float64), scales.astype(int) - 127)
        rounded = product.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.where(scales == 255, np.float32(np.nan), rounded)


def wrong_bytes(found: np.ndarray, data: np.ndarray, scales: np.ndarray, *, flushes: bool) -> np.ndarray:
    """Which products are not exactly `exact_bytes`.

    Args:
      flushes: subnormal results, and all of scale 0, a subnormal factor, may be zeros.
    """
    expected = exact_bytes(data, scales)
    right = (found == expected) | (np.isnan(found) & np.isnan(expected))
    if flushes:
        right |= (found == 0) & ((np.abs(expected) < np.finfo(np.float32).tiny) | (scales == 0))
    return ~right


def _add_norm(impl: str, shrink: int) -> list[str]:
    lines = []
    for tokens in TOKENS:
        keys = jax.random.split(jax.random.key(tokens), 3)
        x, update = (jax.random.normal(key, (tokens, HIDDEN // shrink), jnp.bfloat16) for key in keys[:2])
        weight = jax.random.normal(keys[2], x.shape[1:], jnp.bfloat16)
        args = (x, update, weight)
        found = _run("add_norm", impl, eps=1e-6)(*args)
        reference, truth = (run(*args) for run in _references("add_norm", eps=1e-6))
        if not (found[0] == reference[0]).all():
            lines.append(f"{tokens} tokens: sums differ")
        lines += _judge(f"{tokens} tokens", found[1], reference[1], truth[1])
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
        lines += _judge_choices(tokens, found, expected, 0.99)
    return lines


def _route(impl: str, shrink: int) -> list[str]:
    lines = []
    keys = jax.random.split(jax.random.key(0), 2)
    weight = jax.random.normal(keys[0], (HIDDEN // shrink, EXPERTS)) * HIDDEN**-0.5
    options = {"num_chosen": PER_TOKEN, "scale": 2.0}
    for tokens in (1, 4, 5, 64):  # up to 4 there is a kernel of its own
        x = jax.random.normal(jax.random.fold_in(keys[1], tokens), (tokens, HIDDEN // shrink))
        args = (x, weight, jnp.linspace(-0.2, 0.2, EXPERTS))
        found, expected = (_run("route_tokens", which, **options)(*args) for which in (impl, "reference"))
        lines += _judge_choices(tokens, found, expected, 0.98)
    return lines


def _judge_choices(tokens: int, found: Any, expected: Any, least_alike: float) -> list[str]:
    """(ids, weights): products and sigmoids differ in the last place, and choices between neighbours turn with them."""
    same = (found[0] == expected[0]).all(axis=1)
    wrong = float(same.mean()) < least_alike or measure_errors(found[1][same], expected[1][same]).largest > 1e-4
    return [f"{tokens} tokens: {int((~same).sum())} choices differ"] if wrong else []


def _experts(impl: str, shrink: int, counts: tuple[int, ...] = ()) -> list[str]:
    lines = []
    hidden, width = HIDDEN // shrink, EXPERT_WIDTH // shrink
    keys = jax.random.split(jax.random.key(1), 3)
    gate_up, down = random_mxfp8(keys[0], (LOCAL, hidden, 2 * width)), random_mxfp8(keys[1], (LOCAL, width, hidden))
    options = {"activation": ACTIVATION, "num_experts": EXPERTS}
    for tokens in counts or (TOKENS if shrink == 1 else TOKENS[:2]):
        x = jax.random.normal(keys[2], (tokens, hidden), jnp.bfloat16)
        random = np.random.default_rng(tokens)
        ids = np.argsort(random.random((tokens, EXPERTS)), axis=1)[:, :PER_TOKEN].astype(np.int32)
        weights = random.random(ids.shape).astype(np.float32)
        for kind, own in {
            "spread": ids, "all here": ids % LOCAL, "one expert": np.full_like(ids, 3), "elsewhere": ids + LOCAL,
        }.items():  # fmt: skip
            args = (x, own, weights, gate_up, down)
            found = _run("routed_experts", impl, **options)(*args)
            lines += _judge(
                f"{tokens} tokens, {kind}", found, *(run(*args) for run in _references("routed_experts", **options))
            )
    return lines


@functools.cache
def _run(op: str, impl: str, **options: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(getattr(mk, op), impl=impl, **options))


@functools.cache
def _references(op: str, **options: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return reference_and_truth(functools.partial(getattr(mk, op), impl="reference", **options))


def _judge(what: str, found: Any, reference: Any, truth: Any) -> list[str]:
    excess = measure_errors(found, truth).excess(measure_errors(reference, truth))
    return [f"{what}: {excess}"] if excess else []
