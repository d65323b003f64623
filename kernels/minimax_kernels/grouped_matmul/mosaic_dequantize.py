"""Device side of the product on Mosaic GPU: bytes of a weight become operand A of `wgmma`, in registers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from minimax_kernels.grouped_matmul.mosaic_columns import (
    REGISTERS,
    ROWS,
    SPLAT,
    STEP,
    Columns,
    M,
    bits_of,
    fragments,
    word_type,
)
from minimax_kernels.mosaic_api import ir, mgpu_utils, plgpu
from minimax_kernels.mxfp8 import BLOCK, straighten
from minimax_kernels.mxfp8_tile import EXPAND_REGISTERS, expand_bytes, expand_ptx, scale_factors


def load_scale_words(
    scales_ref: Any, expert: jax.Array, first: jax.Array, word: jax.Array, columns: Columns, *, interpret: bool
) -> jax.Array:
    """uint32 [64], for each row of the `wgmma` four scales, of inputs `word` * 128 on.

    Args:
      scales_ref: [E, N, K / 32] uint8.
      first: first column of the tile, of gate if halves.
    """
    _, width, per_column = scales_ref.shape
    if interpret:
        at = columns.of_group(lax.axis_index("warpgroup"))
        at = first + at + (lax.div(at, M) * (width // 2 - M) if columns is Columns.HALVES else 0)
        scales = scales_ref[expert][at, :]
        four = lax.dynamic_slice_in_dim(scales, word * 4, 4, axis=1).astype(jnp.uint32)
        return (four << (8 * jnp.arange(4, dtype=jnp.uint32))).sum(axis=1, dtype=jnp.uint32)
    second = (columns.second if columns is Columns.WHOLE else width // 2) * per_column

    def load(_: Any, ref: Any, first: Any, word: Any) -> Any:
        ptx = f"""{{
{REGISTERS}.reg .b64 at, from;
{columns.ptx}add.u32 column, column, $3;
mad.lo.u32 address, column, {per_column}, 0;
mad.lo.u32 address, $4, 4, address;
cvt.u64.u32 at, address;
add.u64 from, at, $2;
ld.global.nc.b32 $0, [from];
ld.global.nc.b32 $1, [from + {second}];
}}"""
        loaded = mgpu_utils.inline_ptx(
            ptx, mgpu_utils.memref_ptr(ref), first.registers.item(), word.registers.item(),
            result_types=(word_type(),) * 2, has_side_effects=True,
        )  # fmt: skip
        return fragments(loaded, (M,), ROWS, word_type(), signed=False)

    result = plgpu.ShapeDtypeStruct((M,), jnp.uint32, ROWS)
    inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SPLAT, SPLAT), return_type=result)
    return inline(load)(scales_ref.at[expert], first, word)


def mark_special(words: jax.Array) -> jax.Array:
    """0x40 in each byte of uint32 `words` that is 0 or 255: bfloat16's bits of 2 ** -127, and a bit that NaN has."""
    changes = words ^ (words << 1)  # in a byte's upper seven bits: where a bit differs from the one before
    some = ((changes & jnp.uint32(0x7E7E7E7E)) + jnp.uint32(0x7F7F7F7F)) | changes
    return ((some ^ jnp.uint32(0xFFFFFFFF)) >> 1) & jnp.uint32(0x40404040)


def dequantize_rows(
    values_ref: Any, words: jax.Array, special: jax.Array, columns: Columns, *, half: int, interpret: bool
) -> jax.Array:
    """bfloat16 [64, 64], operand A of `wgmma` in registers, exactly as `mxfp8_tile.dequantize_tile`.

    Args:
      values_ref: [128, 64] float8_e4m3fn in shared memory, inputs interleaved.
      words: of `load_scale_words`.
      special: of `mark_special`.
      half: which two of the four scales.
    """
    if interpret:
        values = values_ref[...][columns.of_group(lax.axis_index("warpgroup"))]
        data = straighten(lax.bitcast_convert_type(values, jnp.uint8))
        two = (words[:, None] >> (16 * half + 8 * jnp.arange(2, dtype=jnp.uint32))).astype(jnp.uint8)
        return expand_bytes(data) * jnp.repeat(scale_factors(two), BLOCK, axis=1)

    def dequantize(_: Any, ref: Any, words: Any, special: Any) -> Any:
        scales = [bits_of(register) for array in (words, special) for register in array.registers.flat]
        registers = mgpu_utils.inline_ptx(
            _dequantize_ptx(columns, half), mgpu_utils.memref_ptr(ref), *scales,
            result_types=(word_type(),) * 16, has_side_effects=True,
        )  # fmt: skip
        return fragments(registers, (M, STEP), plgpu.Layout.WGMMA, ir.BF16Type.get())

    result = plgpu.ShapeDtypeStruct((M, STEP), jnp.bfloat16, plgpu.Layout.WGMMA)
    inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROWS, ROWS), return_type=result)
    return inline(dequantize)(values_ref, words, special)


def _dequantize_ptx(columns: Columns, half: int) -> str:
    """16 registers of 16 bytes of each of two columns; $16: the tile, $17, $18: scales, $19, $20: special ones."""
    lines = [
        "{",
        REGISTERS + EXPAND_REGISTERS + ".reg .b32 data<4>, factor, mark;",
        columns.ptx,
        f"mad.lo.u32 address, column, {STEP}, $16;",
        "mad.lo.u32 address, quarter, 16, address;",
    ]
    for row in range(2):
        source = f"address + {columns.second * STEP * row}"
        lines.append(f"ld.shared.v4.b32 {{data0, data1, data2, data3}}, [{source}];")
        for word in range(4):
            if word % 2 == 0:  # of 32 inputs
                byte = 0x4040 + 0x0101 * (2 * half + word // 2)
                lines.append(f"prmt.b32 factor, ${17 + row}, 0, {byte};")
                lines.append(f"prmt.b32 mark, ${19 + row}, 0, {byte};")
                lines.append("mad.lo.u32 factor, factor, 128, mark;")  # a byte is bfloat16's own exponent field
            pairs = f"${4 * word + row}", f"${4 * word + 2 + row}"
            lines.append(expand_ptx(f"data{word}", pairs, ("factor", "factor")))
    return "\n".join([*lines, "}"])
