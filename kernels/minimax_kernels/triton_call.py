"""One place that launches Pallas kernels on the Triton backend, or in Pallas's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclasses.dataclass(frozen=True)
class Launch:
    """How one kernel is compiled.

    Attributes:
      num_warps: of 32 threads a program.
      num_stages: depth of the software pipeline of its loops.
    """

    num_warps: int = 4
    num_stages: int = 3


def triton_call(
    kernel: Callable[..., None],
    args: Sequence[jax.Array],
    out_shape: Any,
    *,
    grid: tuple[int, ...],
    launch: Launch,
    name: str,
    interpret: bool,
    aliases: Mapping[int, int] | None = None,
) -> Any:
    """Runs `kernel(*arg_refs, *out_refs)` over `grid`; every reference is to a whole array in device memory.

    Args:
      out_shape: a `jax.ShapeDtypeStruct`, or a tuple of them.
      aliases: argument -> output that is the same memory.
      interpret: run in Pallas's interpreter, on any device, slowly.
    """
    # kernels count in 32 bits, also where JAX_ENABLE_X64 makes 64 of plain numbers and of the caller's tables
    narrow = [x.astype(jnp.int32) if x.dtype == jnp.int64 else x for x in args]
    with jax.enable_x64(False):
        return pl.pallas_call(
            kernel,
            out_shape=out_shape,
            grid=grid,
            input_output_aliases=dict(aliases or {}),
            compiler_params=plgpu.CompilerParams(num_warps=launch.num_warps, num_stages=launch.num_stages),
            interpret=interpret,
            name=name,
        )(*narrow)


def ceil_div(numerator: int, denominator: int) -> int:
    """Of static sizes, rounded up."""
    return -(-numerator // denominator)


def next_power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def floor_power_of_two(size: int) -> int:
    """The largest power of two that is at most `size` (>= 1)."""
    return 1 << (size.bit_length() - 1)


def is_power_of_two(size: int) -> bool:
    """Triton's blocks have such sizes only."""
    return size > 0 and size & (size - 1) == 0
