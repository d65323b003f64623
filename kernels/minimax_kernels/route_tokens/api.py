"""route_tokens: the router's product and its choice together, for few tokens."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from minimax_kernels import checks
from minimax_kernels.choose_experts.api import check_choice
from minimax_kernels.implementation import dispatch, implementations
from minimax_kernels.route_tokens import pallas_triton, reference

_IMPLEMENTATIONS = implementations(pallas_triton.route_tokens, reference.route_tokens)


def route_tokens(
    x: Float[Array, "T H"],
    weight: Float[Array, "H E"],
    bias: Float[Array, "E"],
    *,
    num_chosen: int,
    scale: float = 1.0,
    impl: str | None = None,
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """`choose_experts` of the logits x @ weight, which are float32 products of float32 numbers; few tokens only.

    Returns:
      (ids int32, weights float32), see `choose_experts`.

    Raises:
      ValueError: for shapes or types that do not fit, or num_chosen outside 1..E.
      NotImplementedError: if the named implementation cannot serve the call; `pallas_triton` takes up to 64 tokens.
    """
    checks.check_rank("x", x, "[T, H]")
    checks.check_float("x", x)
    checks.check_rank("weight", weight, "[H, E]")
    checks.check_extent("weight", "H", weight.shape[0], x.shape[1], "in x")
    check_choice("weight", weight, bias, num_chosen)
    return dispatch(
        "route_tokens", _IMPLEMENTATIONS, impl, x, weight, bias,
        differentiable=True, num_chosen=num_chosen, scale=float(scale),
    )  # fmt: skip
