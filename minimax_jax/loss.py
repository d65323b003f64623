"""Losses of a forward pass, with transformers' definitions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IGNORED = -100


@jax.jit
def causal_lm_loss(logits: Float[Array, "R L V"], labels: Int[Array, "R L"]) -> Float[Array, ""]:
    """Mean cross entropy of each token's logits against the next token's label; labels of -100 do not count.

    NaN if no label counts, as in transformers.
    """
    targets = labels[:, 1:]
    counts = targets != IGNORED
    scores = logits[:, :-1]
    chosen = jnp.take_along_axis(scores, jnp.where(counts, targets, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(scores, axis=-1) - chosen
    return jnp.where(counts, losses, 0).sum() / counts.sum()


@functools.partial(jax.jit, static_argnames="per_token")
def load_balancing_loss(
    router_logits: tuple[Float[Array, "T E"], ...], live: Bool[Array, "T"], *, per_token: int
) -> Float[Array, ""]:
    """E * sum over experts of (tokens that choose it / tokens) * (its mean probability), over all layers.

    The auxiliary loss of Switch Transformer (arXiv 2101.03961, equations 4 to 6), of softmax probabilities and their
    `per_token` best, as transformers computes it for this model.

    Args:
      live: which rows are tokens.
    """
    num_experts = router_logits[0].shape[1]
    weight = live.astype(jnp.float32)
    chosen, probability = jnp.zeros((2, num_experts))
    for logits in router_logits:
        probabilities = jax.nn.softmax(logits, axis=-1)
        _, experts = jax.lax.top_k(probabilities, per_token)
        chosen += (jax.nn.one_hot(experts, num_experts).sum(axis=1) * weight[:, None]).sum(axis=0)
        probability += (probabilities * weight[:, None]).sum(axis=0)
    rows = weight.sum() * len(router_logits)
    return num_experts * jnp.sum(chosen / rows * probability / rows)
