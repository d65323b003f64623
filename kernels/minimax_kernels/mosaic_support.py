"""What the Pallas kernels on Mosaic GPU can serve; what they cannot raises NotImplementedError."""

from __future__ import annotations

import jax

from minimax_kernels.mxfp8 import Mxfp8
from minimax_kernels.weight_tiles import Weight

LEAST_JAX = (0, 11)
INPUTS, COLUMNS = 128, 128  # what a weight's must be multiples of; columns of each half where halves are joined: 64


def require_mosaic_gpu() -> None:
    """Before anything of Mosaic GPU is imported: older versions of JAX name it otherwise."""
    if jax.__version_info__ < LEAST_JAX:
        least = ".".join(map(str, LEAST_JAX))
        raise NotImplementedError(f"pallas_mosaic_gpu: needs jax {least}, this is {jax.__version__}")


def require_mxfp8_weight(x: jax.Array, w: Weight) -> Mxfp8:
    """The weight, if types and sizes of rows and weight are what the products take."""
    if x.dtype != "bfloat16":
        raise NotImplementedError(f"pallas_mosaic_gpu: rows are {x.dtype}, not bfloat16")
    if not isinstance(w, Mxfp8):
        raise NotImplementedError(f"pallas_mosaic_gpu: the weight is {w.dtype}, not Mxfp8")
    for name, size, multiple in (("K", w.shape[-2], INPUTS), ("N", w.shape[-1], COLUMNS)):
        if size % multiple:
            raise NotImplementedError(
                f"pallas_mosaic_gpu: {name} = {size} of the weight is not a multiple of {multiple}"
            )
    if w.values.size >= 1 << 31:
        raise NotImplementedError(f"pallas_mosaic_gpu: the weight has {w.values.size} bytes, 2 GiB or more")
    return w
