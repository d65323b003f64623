"""Device side of the product on Mosaic GPU: which columns of a weight are which rows of a `wgmma`, in registers.

A warpgroup multiplies 64 columns of the weight, the rows of its `wgmma`: of 16 a warp each thread has two, g and g + 8,
g = lane / 4. Which columns of the matrix those are may be chosen freely:

- `Columns.HALVES`: g is a column of gate and g + 8 the same of up, so that a thread can join them by itself.
- `Columns.WHOLE`: columns 4 (g / 2) + g % 2 and two more, so that a thread has four side by side once `store_rows` has
  transposed them, and eight threads read 128 bytes in a row of the weight in shared memory.

Where Pallas has no words for it, functions here and beside write PTX; each does the same in plain jnp for the
interpreter, where rows of a `wgmma` are in the columns' own order.
"""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from minimax_kernels.mosaic_api import ir, mgpu, mgpu_utils, plgpu
from minimax_kernels.mxfp8 import BLOCK, INTERLEAVED

M = 64  # rows of a wgmma: columns of the weight that a warpgroup has
TILE_COLUMNS = 2 * M  # of the weight, of two warpgroups
STEP = INTERLEAVED  # inputs
WORD = 4 * BLOCK  # inputs whose scales are one word of 32 bits

SPLAT: Any = plgpu.Layout.WG_SPLAT(())
ROWS: Any = plgpu.Layout.WGMMA.reduce(1)  # a number for each row of a wgmma

REGISTERS = ".reg .b32 warp, quarter, group, column, address;\n"
# of both warpgroups; quarter: of the four threads that share a row
THREAD = """mov.u32 warp, %tid.x;
and.b32 quarter, warp, 3;
bfe.u32 group, warp, 2, 3;
shr.u32 warp, warp, 5;
"""


class Columns(enum.Enum):
    """Which columns of the weight two warpgroups have: 128 side by side, or 64 of gate and the same 64 of up."""

    WHOLE = enum.auto()
    HALVES = enum.auto()

    @property
    def outputs(self) -> int:
        """Columns of the result."""
        return TILE_COLUMNS if self is Columns.WHOLE else TILE_COLUMNS // 2

    @property
    def ptx(self) -> str:
        """Gives `column`, of the tile, that is this thread's row g."""
        if self is Columns.HALVES:
            return THREAD + "mad.lo.u32 column, warp, 8, group;\n"
        return (
            THREAD
            + """and.b32 column, group, 1;
shr.u32 group, group, 1;
mad.lo.u32 column, group, 4, column;
mad.lo.u32 column, warp, 16, column;
"""
        )

    @property
    def second(self) -> int:
        """How many columns of the tile further row g + 8 is."""
        return M if self is Columns.HALVES else 2

    def of_group(self, group: jax.Array) -> jax.Array:
        """[64] columns of the tile that a warpgroup has, in their own order."""
        if self is Columns.WHOLE:
            return group * M + jnp.arange(M, dtype=jnp.int32)
        half = jnp.arange(M, dtype=jnp.int32)
        return group * (M // 2) + half + lax.div(half, M // 2) * (M - M // 2)


def bits_of(register: Any) -> Any:
    """The 32 bits of a register, however MLIR has them."""
    return mgpu_utils.bitcast(register, word_type())


def word_type() -> Any:
    """Of 32 bits without a sign."""
    return ir.IntegerType.get_signless(32)


def fragments(bits: Any, shape: tuple[int, ...], layout: Any, element: Any, *, signed: bool | None = None) -> Any:
    """An array of registers in the order of its layout: of [64, n] each eight columns' two rows."""
    layout = layout.to_mgpu()
    kind = layout.registers_element_type(element)
    registers = np.empty(len(bits), dtype=object)  # np.array would look into vectors
    for i, register in enumerate(bits):
        registers[i] = mgpu_utils.bitcast(register, kind)
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape(shape)), _layout=layout, _is_signed=signed
    )
