"""sampling_cut: where top-k and top-p cut the tokens of each row."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels import checks
from minimax_kernels.implementation import dispatch, implementations
from minimax_kernels.sampling_cut import pallas_triton, reference

CANDIDATES = 128  # likeliest tokens among which a cut is looked for before all tokens are

_IMPLEMENTATIONS = implementations(pallas_triton.sampling_cut, reference.sampling_cut)


def sampling_cut(
    scaled: Float[Array, "R V"],
    top_k: Int[Array, "R"],
    top_p: Float[Array, "R"],
    min_p: Float[Array, "R"],
    *,
    candidates: int = CANDIDATES,
    impl: str | None = None,
) -> tuple[Float[Array, "R"], Int[Array, "R"]]:
    """The last token, from the likeliest one on, that top-k and top-p keep; of equal ones the lower id comes first.

    The `top_k` likeliest tokens are kept, and of these the fewest whose probabilities reach `top_p`, in the
    distribution that `top_k` and `min_p` leave; at least one, and all of them where `top_p` is 1.

    Args:
      scaled: log probabilities up to a constant, float32; each row's largest is 0.
      top_k: V or more for all.
      top_p: 1 or more for all; the likeliest token stays however small it is.
      min_p: tokens less likely than this, relative to the likeliest, have no share in the distribution.
      candidates: so many likeliest tokens are looked at first; it decides on the time that is taken only.

    Returns:
      (value, id int32) of that token: those with a larger value, or with the same and no larger id, are kept.

    Raises:
      ValueError: for shapes or types that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    checks.check_rank("scaled", scaled, "[R, V]")
    for name, x, dtype in (
        ("scaled", scaled, jnp.float32), ("top_k", top_k, jnp.int32), ("top_p", top_p, jnp.float32),
        ("min_p", min_p, jnp.float32),
    ):  # fmt: skip
        if x.dtype != dtype:
            raise ValueError(f"{name} is {x.dtype}: must be {jnp.dtype(dtype)}")
    for name, x in (("top_k", top_k), ("top_p", top_p), ("min_p", min_p)):
        checks.check_rank(name, x, "[R]")
        checks.check_extent(name, "R", x.shape[0], scaled.shape[0], "in scaled")
    checks.check_positive("candidates", candidates)
    checks.check_positive("scaled's V", scaled.shape[1])
    return dispatch(
        "sampling_cut", _IMPLEMENTATIONS, impl, scaled, top_k, top_p, min_p, candidates=min(candidates, scaled.shape[1])
    )
