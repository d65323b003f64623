"""Launch parameters of products with weights, by shape."""

from __future__ import annotations

import dataclasses

from minimax_kernels.launch_table import NUM_SMS
from minimax_kernels.measured_products import PRODUCTS
from minimax_kernels.triton_call import Launch, ceil_div, floor_power_of_two, next_power_of_two

LEAST_COLUMNS = 16  # of a tile, as the matrix instructions have them
FEW_ROWS = 64  # rows up to which a product is bound by reading its weight
MOST_BLOCK_K = 128
GROUP_BLOCK_K = 256  # of few rows: this many bytes of a column are next to each other
LEAST_ROWS = 16  # of a tile


@dataclasses.dataclass(frozen=True)
class MatmulLaunch:
    """Of a product of rows with a weight.

    Attributes:
      block_m: rows of a program, a power of two.
      block_n: columns of a program, a power of two that divides the weight's.
      block_k: inputs of a step, a multiple of `interleaved_inputs` (64, or 32) that divides the weight's.
      splits: programs that share the inputs of one tile; their partial sums are added up afterwards.
    """

    block_m: int
    block_n: int
    block_k: int
    splits: int
    launch: Launch


def measured_launch(
    kind: str, quantized: bool, num_groups: int, num_rows: int, in_features: int, column_divisor: int, out_features: int
) -> MatmulLaunch | None:
    """What was measured for this weight at this number of rows, rounded up to a power of two; None if nothing was.

    Args:
      kind: "matmul", or for sorted rows "groups", or "joined" where the halves are joined.
    """
    weight = "mxfp8" if quantized else "bf16"
    found = PRODUCTS.get((kind, weight, num_groups, in_features, out_features, next_power_of_two(num_rows)))
    if found is None or column_divisor % found[1]:
        return None
    return MatmulLaunch(*found[:4], Launch(*found[4:6]))


def largest_divisor(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides `size`."""
    return min(size & -size, most)


def matmul_launch(
    num_rows: int, in_features: int, column_divisor: int, out_features: int, *, quantized: bool = True
) -> MatmulLaunch:
    """For all rows times one weight, or several side by side.

    Args:
      column_divisor: what a tile's columns must divide.
      out_features: of all weights together.
      quantized: whether the weights are MXFP8.
    """
    measured = measured_launch("matmul", quantized, 1, num_rows, in_features, column_divisor, out_features)
    if measured is not None:
        return measured
    if num_rows <= FEW_ROWS:
        # 64 columns of an MXFP8 weight, its rows as it lies, are what the matrix instructions take
        block_n, block_k = largest_divisor(column_divisor, 64), largest_divisor(in_features, MOST_BLOCK_K)
        if not quantized and out_features < NUM_SMS * block_n <= 2 * out_features:
            block_n = max(block_n // 2, LEAST_COLUMNS)  # narrower tiles fill the device without splits
        programs = out_features // block_n
        splits = _splits(programs, 3 * NUM_SMS, in_features // block_k) if programs < NUM_SMS else 1
        block_m = max(next_power_of_two(num_rows), LEAST_ROWS)
        return MatmulLaunch(block_m, block_n, block_k, splits, Launch(4, 4 if block_m <= 32 else 3))
    block_m, block_n = (128 if num_rows > 256 else 64), largest_divisor(column_divisor, 128)
    block_k = largest_divisor(in_features, 64)
    programs = ceil_div(num_rows, block_m) * (out_features // block_n)
    splits = _splits(programs, 2 * NUM_SMS, in_features // (2 * block_k)) if programs < NUM_SMS else 1
    return MatmulLaunch(block_m, block_n, block_k, splits, Launch(4, 3))


def group_launch(
    num_rows: int,
    num_groups: int,
    in_features: int,
    column_divisor: int,
    out_features: int,
    *,
    joined: bool = False,
    quantized: bool = True,
    all_rows: int | None = None,
) -> MatmulLaunch:
    """For rows that groups share evenly, as far as is known before they are counted.

    Args:
      joined: a program takes block_n columns of each of two halves; with splits, which cannot join, of the whole.
      quantized: whether the weights are MXFP8.
      all_rows: rows that there is room for, `num_rows` if None; every split writes its sums of all of them.
    """
    mean_rows = ceil_div(num_rows, num_groups)
    kind = "joined" if joined else "groups"
    measured = measured_launch(kind, quantized, num_groups, num_rows, in_features, column_divisor, out_features)
    if measured is not None:
        return measured
    halves = 2 if joined else 1
    if mean_rows > FEW_ROWS:
        block_k, block_n = largest_divisor(in_features, 64), largest_divisor(column_divisor, 128 // halves)
        return MatmulLaunch(128 if mean_rows > 128 else 64, block_n, block_k, 1, Launch(4, 3))
    block_n = largest_divisor(column_divisor, 64 // halves if quantized else 128 // halves)
    programs = min(num_rows, num_groups) * (out_features // halves // block_n)
    # a group that has several times the mean takes several tiles, which find its weight in the second-level cache
    block_m = min(max(next_power_of_two(2 * mean_rows), LEAST_ROWS), FEW_ROWS)
    most = (GROUP_BLOCK_K if block_m <= 16 else MOST_BLOCK_K) if quantized else 64
    # several steps, so that memory is read while others are multiplied
    block_k = largest_divisor(in_features, min(most, max(64, floor_power_of_two(in_features // 4))))
    launch = Launch(4, 3 if block_k == GROUP_BLOCK_K else 4)
    if (num_rows if all_rows is None else all_rows) <= FEW_ROWS and programs < 2 * NUM_SMS:
        splits = min(_splits(programs, 8 * NUM_SMS, in_features // block_k), 8)
        if splits > 1:
            return MatmulLaunch(block_m, block_n * halves, block_k, splits, launch)
    return MatmulLaunch(block_m, block_n, block_k, 1, launch)


def _splits(programs: int, wanted: int, most: int) -> int:
    # XLA adds up no more than that many inside the kernel that reads the sums
    return max(1, min(round(wanted / programs), most, 16))
