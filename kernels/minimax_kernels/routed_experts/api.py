"""routed_experts: each token's experts, weighted and summed."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_kernels import checks
from minimax_kernels.implementation import dispatch, implementations, mosaic_gpu
from minimax_kernels.matmul.api import check_weight
from minimax_kernels.routed_experts import pallas_triton, reference
from minimax_kernels.swiglu import Swiglu
from minimax_kernels.weight_tiles import Weight

# rows an expert, as far as is known before they are counted, from which Mosaic GPU was measured to be faster
MANY_ROWS = 64
_IMPLEMENTATIONS = implementations(pallas_triton.routed_experts, reference.routed_experts, mosaic_gpu("routed_experts"))


def routed_experts(
    x: Float[Array, "T H"],
    expert_ids: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    gate_up: Weight,
    down: Weight,
    addend: Float[Array, "T H"] | None = None,
    first_expert: Int[Array, ""] | int = 0,
    *,
    activation: Swiglu,
    num_experts: int | None = None,
    impl: str | None = None,
) -> Float[Array, "T H"]:
    """Sum over a token's experts e of weight * (activation(x @ gate_up[e]) @ down[e]).

    Products accumulate in float32 and are rounded to x's type, the activation is float32, and the sum is float32 in
    the token's own order of experts. Ids outside first_expert..first_expert + E - 1 stand for experts elsewhere and add
    nothing.

    Args:
      gate_up: [E, H, 2 * F], [gate | up].
      down: [E, F, H].
      addend: of x's type, what each token gets besides (a shared expert's output), added to the rounded sum.
      first_expert: the id of expert 0 here, at least 0; where ranks hold experts each, its place times E. It is data to
        the kernels, so that no launch renames the ids.
      num_experts: how many experts the ids were chosen from, here and elsewhere, at least 1; None if all are here. A
        guess of how many rows come here, from which tiles are chosen; any number gives the same result.

    Raises:
      ValueError: for shapes or types that do not fit.
      NotImplementedError: if the named implementation cannot serve the call.
    """
    checks.check_rank("x", x, "[T, H]")
    checks.check_float("x", x)
    checks.check_rank("expert_ids", expert_ids, "[T, k]")
    checks.check_int("expert_ids", expert_ids)
    checks.check_extent("expert_ids", "T", expert_ids.shape[0], x.shape[0], "in x")
    if weights.shape != expert_ids.shape or not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"weights is {weights.dtype} of shape {tuple(weights.shape)}: must be floating, of expert_ids' "
            f"{tuple(expert_ids.shape)}"
        )
    if num_experts is not None:
        checks.check_positive("num_experts", num_experts)
    first_expert = jnp.asarray(first_expert)
    if first_expert.shape != () or not jnp.issubdtype(first_expert.dtype, jnp.integer):
        raise ValueError(
            f"first_expert is {first_expert.dtype} of shape {tuple(first_expert.shape)}: must be one integer"
        )
    check_weight("gate_up", gate_up, "[E, H, 2F]")
    check_weight("down", down, "[E, F, H]")
    checks.check_multiple("gate_up's last axis", gate_up.shape[2], "the number of halves", 2)
    checks.check_extent("gate_up", "H", gate_up.shape[1], x.shape[1], "in x")
    for axis, name, expected, source in (
        (0, "E", gate_up.shape[0], "in gate_up"),
        (1, "F", gate_up.shape[2] // 2, "half of gate_up's last axis"),
        (2, "H", x.shape[1], "in x"),
    ):
        checks.check_extent("down", name, down.shape[axis], expected, source)
    if addend is not None and (addend.shape != x.shape or addend.dtype != x.dtype):
        raise ValueError(
            f"addend is {addend.dtype} of shape {tuple(addend.shape)}: must be {x.dtype} of {tuple(x.shape)}, as x"
        )
    many = expert_ids.size >= MANY_ROWS * (gate_up.shape[0] if num_experts is None else num_experts)
    return dispatch(
        "routed_experts", _IMPLEMENTATIONS, impl, x, expert_ids, weights, gate_up, down, addend,
        first_expert.astype(jnp.int32), differentiable=True, activation=activation, num_experts=num_experts,
        best=("pallas_mosaic_gpu", "pallas_triton") if many else ("pallas_triton",),
    )  # fmt: skip
