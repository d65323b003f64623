"""One case made ready: its launches, its random operands, what it should give, and each launch compiled."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.products.cases import LOCAL, PER_TOKEN, RANKS, Case, candidates
from benchmarks.products.errors import reference_and_truth
from benchmarks.products.weights import random_mxfp8
from minimax_kernels import Swiglu
from minimax_kernels.grouped_matmul import reference as grouped_reference
from minimax_kernels.grouped_matmul.gather_rows import gather_rows
from minimax_kernels.grouped_matmul.pallas_triton import multiply_groups
from minimax_kernels.grouped_matmul.row_tiles import cut_rows
from minimax_kernels.matmul import pallas_triton, reference
from minimax_kernels.matmul.slabs import some_take_slabs
from minimax_kernels.matmul.sum_splits import sum_splits
from minimax_kernels.matmul_launches import MatmulLaunch

ACTIVATION = Swiglu(1.702, 1.0, 7.0)
CACHE_BYTES = 150e6  # what a rotation of inputs must exceed, for the second-level cache to be of no help
GROUP_SETS = 16  # choices of experts to rotate through


class CaseRun:
    """A case with what its measurement needs.

    Attributes:
      launches: to try; None is what the package does where that is no single launch (`matmul.slabs`, Mosaic GPU).
      group_sizes: rows of each expert for each set, empty for plain products.
      bytes, flops: of one call, the mean over sets.
      sets: how many to rotate through; of experts each is another choice among the same weights.
      calls, rounds: of one executable (`timing.compile_calls`).
    """

    def __init__(self, case: Case, *, interpret: bool, quick: bool):
        self.case, self.interpret = case, interpret
        self.group_sizes = [] if case.kind == "matmul" else [group_sizes(case, seed) for seed in range(GROUP_SETS)]
        self.works = [case.work(own.tolist()) for own in self.group_sizes] or [case.work()]
        self.bytes, self.flops = (
            sum(getattr(work, name) for work in self.works) / len(self.works) for name in ("bytes", "flops")
        )
        self.sets = len(self.group_sizes) or max(2, math.ceil(CACHE_BYTES / self.bytes))
        if interpret:
            self.sets = min(self.sets, 2)
        expected = max(self.bytes / 2.5e12, self.flops / 4e14, 3e-6)
        self.calls, self.rounds = (1, 1) if interpret else timing.calls_and_rounds(expected, self.sets)
        # the seed is an argument: one compilation for all sets
        self.draw: Any = jax.jit(lambda seed: draw_arguments(case, jax.random.key(seed, impl="rbg")))
        self.structs = jax.eval_shape(self.draw, 0)
        self.reference: Any
        self.truth: Any
        self.reference, self.truth = reference_and_truth(functools.partial(_expected, case))
        self.by_slabs = case.kind == "matmul" and some_take_slabs(self.structs[1:], case.rows)
        own: list[MatmulLaunch | None] = [None] if self.by_slabs or case.mosaic else []
        self.launches = [*own, *([] if case.mosaic else candidates(case))][: 1 if quick else None]

    def arguments(self) -> list[tuple[Any, ...]]:
        """The sets to rotate through."""
        if not self.group_sizes:
            return [self.draw(seed) for seed in range(self.sets)]
        x, weight, _, source = self.draw(0)
        return [(x, weight, jnp.asarray(own), source) for own in self.group_sizes[: self.sets]]

    def function(self, launch: MatmulLaunch | None) -> Callable[..., Any]:
        """The product with this launch, and whatever makes a result of its partial sums."""
        case = self.case
        if case.kind == "matmul":

            def multiply(x, *weights):
                return pallas_triton.matmul(x, weights, dtype=jnp.bfloat16, launch=launch, interpret=self.interpret)

            return multiply
        if case.mosaic:
            return functools.partial(_multiply_on_mosaic, case, self.interpret)
        assert launch is not None
        joined = case.kind == "joined"

        def groups(x, w, sizes, source):
            result = multiply_groups(
                x, w, sizes, launch=launch, interpret=self.interpret, source=source if joined else None,
                activation=ACTIVATION if joined and launch.splits == 1 else None,
            )  # fmt: skip
            if launch.splits == 1:
                return (result,)
            if joined:
                return sum_splits([result], dtype=x.dtype, activation=ACTIVATION, interpret=self.interpret)
            return (result.sum(axis=0).astype(x.dtype),)

        return groups

    def compile(self, launch: MatmulLaunch | None) -> Any:
        """The executable, or a line that says why there is none."""
        try:
            return timing.compile_calls(self.function(launch), self.structs, self.calls, None, self.rounds)
        except Exception as error:  # noqa: BLE001 one launch that does not fit the device must not lose the others
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def compile_rest(self) -> None:
        """What draws the operands and what they should give, so that nothing of it compiles between timings."""
        self.draw = self.draw.lower(0).compile()
        self.reference = self.reference.lower(*self.structs).compile()
        self.truth = self.truth.lower(*self.structs).compile()


def _multiply_on_mosaic(
    case: Case, interpret: bool, x: jax.Array, w: Any, sizes: jax.Array, source: jax.Array
) -> tuple[jax.Array, ...]:
    """As `routed_experts` would; of "groups" with a copy besides, as there [gate | up] writes rows where down reads."""
    from minimax_kernels.grouped_matmul import pallas_mosaic_gpu  # not every version of JAX has what it needs

    launch = pallas_mosaic_gpu.INTERPRETED if interpret else pallas_mosaic_gpu.MosaicLaunch()
    joined = case.kind == "joined"
    tiles = cut_rows(sizes, case.all_rows, launch.widths, interpret=interpret)
    rows = gather_rows(x, sizes, source if joined else None, interpret=interpret)
    return (
        pallas_mosaic_gpu.multiply_sorted(
            rows, w, tiles, sorted_rows=case.all_rows, launch=launch, activation=ACTIVATION if joined else None,
            interpret=interpret,
        ),
    )  # fmt: skip


def draw_arguments(case: Case, key: jax.Array) -> tuple[Any, ...]:
    """Random rows and weights, as the function of the case takes them; of experts without their sizes."""
    rows_key, *keys = jax.random.split(key, 1 + len(case.widths))
    lead = () if case.kind == "matmul" else (LOCAL,)
    weights = tuple(
        _weight(own, (*lead, case.inputs, width), case.weights) for own, width in zip(keys, case.widths, strict=True)
    )
    rows = case.all_rows if case.kind == "groups" else case.tokens
    x = jax.random.normal(rows_key, (rows, case.inputs), jnp.bfloat16)
    if case.kind == "matmul":
        return (x, *weights)
    source = jax.random.permutation(rows_key, case.all_rows).astype(jnp.int32) // PER_TOKEN
    return x, weights[0], jnp.zeros((LOCAL,), jnp.int32), source


def group_sizes(case: Case, seed: int) -> np.ndarray:
    """This rank's pairs of tokens that choose four different experts each, all alike; int32 [experts]."""
    random = np.random.default_rng(seed)
    chosen = np.argsort(random.random((case.tokens, LOCAL * RANKS)), axis=1)[:, :PER_TOKEN]
    sizes = np.bincount(chosen[chosen < LOCAL], minlength=LOCAL)
    if sizes.sum() == 0:
        sizes[0] = 1  # a step without work here would measure nothing
    return sizes.astype(np.int32)


def _weight(key: jax.Array, shape: tuple[int, ...], weights: str) -> Any:
    return random_mxfp8(key, shape) if weights == "mxfp8" else jax.random.normal(key, shape, jnp.bfloat16)


def _expected(case: Case, x: jax.Array, *rest: Any) -> tuple[jax.Array, ...]:
    if case.kind == "matmul":
        return reference.matmul(x, rest, dtype=x.dtype)
    weight, sizes, source = rest
    result = grouped_reference.grouped_matmul(x[source] if case.kind == "joined" else x, weight, sizes)
    return (ACTIVATION.halves(result) if case.kind == "joined" else result,)
