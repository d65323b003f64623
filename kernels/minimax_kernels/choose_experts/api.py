"""choose_experts: the router's choice and its weights."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels import checks
from minimax_kernels.choose_experts import pallas_triton, reference
from minimax_kernels.implementation import dispatch, implementations

_IMPLEMENTATIONS = implementations(pallas_triton.choose_experts, reference.choose_experts)


def choose_experts(
    logits: Float[Array, "T E"],
    bias: Float[Array, "E"],
    *,
    num_chosen: int,
    scale: float = 1.0,
    impl: str | None = None,
) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """Each token's `num_chosen` experts of highest sigmoid(logits) + bias, best first; of equal ones the lower id.

    Returns:
      (ids int32, weights float32): sigmoid(logits) of the chosen, without the bias, divided by their sum, times scale.
      NaN logits make NaN weights.

    Raises:
      ValueError: for shapes or types that do not fit, or num_chosen outside 1..E.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    checks.check_rank("logits", logits, "[T, E]")
    check_choice("logits", logits, bias, num_chosen)
    return dispatch(
        "choose_experts", _IMPLEMENTATIONS, impl, logits, bias,
        differentiable=True, num_chosen=num_chosen, scale=float(scale),
    )  # fmt: skip


def check_choice(name: str, array: Float[Array, "_ E"], bias: Float[Array, "E"], num_chosen: int) -> None:
    """Types of the array that scores experts and of their bias, and that there are as many as are chosen."""
    for own, x in ((name, array), ("bias", bias)):
        if x.dtype != jnp.float32:
            raise ValueError(f"{own} is {x.dtype}: must be float32")
    checks.check_rank("bias", bias, "[E]")
    checks.check_extent("bias", "E", bias.shape[0], array.shape[1], f"in {name}")
    checks.check_positive("num_chosen", num_chosen)
    if num_chosen > array.shape[1]:
        owner = f"{name}'" if name.endswith("s") else f"{name}'s"
        raise ValueError(f"num_chosen = {num_chosen}: must be at most {owner} E = {array.shape[1]}")
