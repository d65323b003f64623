"""What the Pallas kernels on the Triton backend can serve; what they cannot raises NotImplementedError."""

from __future__ import annotations

import jax

from minimax_kernels.cache_types import FP8, is_fp8
from minimax_kernels.matmul_launches import LEAST_COLUMNS, largest_divisor
from minimax_kernels.mxfp8 import BLOCK, Mxfp8
from minimax_kernels.triton_call import is_power_of_two
from minimax_kernels.weight_tiles import Weight

NARROW = ("bfloat16", "float16")
MOST_PAGE_ELEMENTS = 128 * 128  # keys and values of a page lie in shared memory together


def require_power_of_two(name: str, value: int, most: int) -> None:
    """Triton's blocks have sizes that are powers of two."""
    if not is_power_of_two(value) or value > most:
        raise NotImplementedError(f"pallas_triton: {name} = {value} is not a power of two up to {most}")


def require_pages(q: jax.Array, cache: jax.Array, block_size: int, head_dim: int, *, interpret: bool) -> None:
    """Types and page sizes that the attention kernels take; the interpreter also takes float32, for exact tests."""
    if cache.dtype != q.dtype and not is_fp8(cache.dtype):
        raise NotImplementedError(
            f"pallas_triton: queries are {q.dtype}, the cache is {cache.dtype}, which is neither that nor {FP8}"
        )
    require_offsets("the cache", cache, interpret=interpret)
    if str(q.dtype) not in NARROW and not interpret:
        raise NotImplementedError(f"pallas_triton: {q.dtype} is not one of {', '.join(NARROW)}")
    for name, value in (("block size", block_size), ("head_dim", head_dim)):
        if not is_power_of_two(value) or not 16 <= value <= 256:
            raise NotImplementedError(f"pallas_triton: {name} = {value} is not a power of two from 16 to 256")
    if block_size * head_dim > MOST_PAGE_ELEMENTS:
        raise NotImplementedError(
            f"pallas_triton: a page of {block_size} tokens of {head_dim} channels has more than "
            f"{MOST_PAGE_ELEMENTS} elements"
        )


def require_weight(x: jax.Array, w: Weight, *, interpret: bool) -> None:
    """Types and sizes of rows and weights that the products take."""
    if x.dtype != "bfloat16":
        raise NotImplementedError(f"pallas_triton: rows are {x.dtype}, not bfloat16")
    if not isinstance(w, Mxfp8) and w.dtype != x.dtype:
        raise NotImplementedError(f"pallas_triton: the weight is {w.dtype}, the rows are {x.dtype}")
    for name, size, least in (("K", w.shape[-2], BLOCK), ("N", w.shape[-1], LEAST_COLUMNS)):
        if largest_divisor(size, least) < least:
            raise NotImplementedError(f"pallas_triton: {name} = {size} of the weight is not a multiple of {least}")
    require_offsets("the weight", w.values if isinstance(w, Mxfp8) else w, interpret=interpret)


def require_offsets(name: str, x: jax.Array, *, interpret: bool) -> None:
    """Pallas counts elements in 32 bits, signed, in arrays of up to 4 GiB: too few where an element is one byte."""
    if not interpret and x.dtype.itemsize == 1 and 1 << 31 < x.size <= 1 << 32:
        raise NotImplementedError(f"pallas_triton: {name} has {x.size} bytes of {x.dtype}, between 2 and 4 GiB")
