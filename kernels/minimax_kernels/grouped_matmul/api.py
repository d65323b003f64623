"""grouped_matmul: each group of rows times its own matrix."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from minimax_kernels import checks
from minimax_kernels.grouped_matmul import pallas_triton, reference
from minimax_kernels.implementation import dispatch, implementations, mosaic_gpu
from minimax_kernels.matmul.api import check_weight
from minimax_kernels.mxfp8 import Mxfp8

_IMPLEMENTATIONS = implementations(pallas_triton.grouped_matmul, reference.grouped_matmul, mosaic_gpu("grouped_matmul"))


def grouped_matmul(
    x: Float[Array, "T K"],
    w: Float[Array, "E K N"] | Mxfp8,
    group_sizes: Int[Array, "E"],
    *,
    impl: str | None = None,
) -> Float[Array, "T N"]:
    """Multiplies the first group_sizes[0] rows with w[0], the next group_sizes[1] with w[1], and so on.

    Rows past the sum of the group sizes give zeros; sizes count as far as x has rows. Products accumulate in
    float32; the result has x's type.

    Raises:
      ValueError: for shapes or types that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    checks.check_rank("x", x, "[T, K]")
    check_weight("w", w, "[E, K, N]")
    checks.check_float("x", x)
    checks.check_int("group_sizes", group_sizes)
    checks.check_extent("x", "K", x.shape[1], w.shape[1], "in w")
    checks.check_rank("group_sizes", group_sizes, "[E]")
    checks.check_extent("group_sizes", "E", group_sizes.shape[0], w.shape[0], "in w")
    return dispatch("grouped_matmul", _IMPLEMENTATIONS, impl, x, w, group_sizes, differentiable=True)
