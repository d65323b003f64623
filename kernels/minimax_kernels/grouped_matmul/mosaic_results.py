"""Device side of the product on Mosaic GPU: what becomes of a `wgmma`'s result, columns of the weight times rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from minimax_kernels.grouped_matmul.mosaic_columns import (
    REGISTERS,
    SPLAT,
    THREAD,
    Columns,
    M,
    bits_of,
    fragments,
    word_type,
)
from minimax_kernels.mosaic_api import ir, mgpu_utils, plgpu


def split_halves(product: jax.Array, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Of a float32 product [64, n] with `Columns.HALVES`: gate and up, each rounded to bfloat16, as float32 [32, n].

    On the device they are [64, n / 2] in an order that only `store_rows` knows.
    """
    columns = product.shape[1]
    if interpret:
        rounded = product.astype(jnp.bfloat16).astype(jnp.float32)
        return rounded[: M // 2], rounded[M // 2 :]
    half = plgpu.ShapeDtypeStruct((M, columns // 2), jnp.float32, plgpu.Layout.WGMMA)

    def split(_: Any, rounded: Any) -> Any:
        pair_type = ir.IntegerType.get_signless(64)
        ptx = """{
.reg .b32 first, second;
shl.b32 first, $1, 16;
and.b32 second, $1, 0xffff0000;
mov.b64 $0, {first, second};
}"""
        halves = []
        for registers in rounded.registers.reshape(columns // 8, 2).T:
            pairs = [mgpu_utils.inline_ptx(ptx, bits_of(register), result_types=pair_type) for register in registers]
            halves.append(fragments(pairs, (M, columns // 2), plgpu.Layout.WGMMA, ir.F32Type.get()))
        return tuple(halves)

    inline = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=(half, half))
    gate, up = inline(split)(product.astype(jnp.bfloat16))
    return gate, up


def store_rows(
    out_ref: Any,
    result: jax.Array,
    first_row: jax.Array,
    first_column: jax.Array,
    num_rows: jax.Array,
    columns: Columns,
    *,
    interpret: bool,
) -> None:
    """Writes a warpgroup's result, transposed: its column c to row first_row + c where c < num_rows.

    Args:
      out_ref: [T, N] bfloat16.
      result: bfloat16 [64, n], or of `split_halves`.
      first_column: of both warpgroups.
    """
    if interpret:
        at = first_column + lax.axis_index("warpgroup") * (columns.outputs // 2)
        for row in range(result.shape[1]):

            @pl.when(row < num_rows)
            def _write(row: int = row) -> None:
                out_ref[first_row + row, pl.ds(at, columns.outputs // 2)] = result[:, row]

        return
    per_chunk = 1 if columns is Columns.HALVES else 2  # registers of eight columns of the result
    width = out_ref.shape[1]
    # after the transposition of 8 x 8 numbers a thread has two columns of the weight, and row lane / 4 of eight
    where = "mad.lo.u32 column, warp, {}, $3;\nmad.lo.u32 column, quarter, {}, column;\n".format(
        *((8, 2) if columns is Columns.HALVES else (16, 4))
    )

    def store(_: Any, ref: Any, result: Any, row: Any, column: Any, live: Any) -> Any:
        registers = result.registers.reshape(-1, per_chunk)
        base, rest = mgpu_utils.inline_ptx(
            f"""{{
{REGISTERS}.reg .b64 at, from;
{THREAD}{where}add.u32 group, group, $4;
mul.wide.u32 from, group, {2 * width};
mul.wide.u32 at, column, 2;
add.u64 at, at, from;
add.u64 $0, at, $2;
sub.u32 group, group, $4;
sub.s32 $1, $5, group;
}}""",
            mgpu_utils.memref_ptr(ref), *(scalar.registers.item() for scalar in (column, row, live)),
            result_types=(ir.IntegerType.get_signless(64), word_type()),
        )  # fmt: skip
        for chunk, parts in enumerate(registers):
            moves = "\n".join(f"movmatrix.sync.aligned.m8n8.trans.b16 part{i}, ${2 + i};" for i in range(per_chunk))
            parts_text = ", ".join(f"part{i}" for i in range(per_chunk))
            mgpu_utils.inline_ptx(
                f"""{{
.reg .b32 part<2>;
.reg .pred live;
{moves}
setp.gt.s32 live, $1, {8 * chunk};
@live st.global{".v2" if per_chunk == 2 else ""}.b32 [$0 + {8 * chunk * 2 * width}], {{{parts_text}}};
}}""",
                base, rest, *map(bits_of, parts), has_side_effects=True,
            )  # fmt: skip
        return ()

    inline = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, SPLAT, SPLAT, SPLAT), return_type=())
    inline(store)(out_ref, result, first_row, first_column, num_rows)
