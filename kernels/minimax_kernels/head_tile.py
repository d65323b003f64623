"""Device side: the norm and the rotation of a tile of heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from minimax_kernels.triton_call import next_power_of_two


@dataclasses.dataclass(frozen=True)
class HeadTile:
    """Some heads of an array [T, H, D], inside a kernel; those past its end repeat the last one and are not written.

    Attributes:
      token, head, live: [step], each row's place in the array, and whether it has one.
      channel: [next power of two of D].
      inside: [step, len(channel)], False from D on.
    """

    out_ref: Any
    token: jax.Array
    head: jax.Array
    live: jax.Array
    channel: jax.Array
    inside: jax.Array

    def store(self, heads: jax.Array) -> None:
        """Writes [step, len(channel)] where they belong, in the array's type."""
        num_tokens = self.out_ref.shape[0]
        to_token = jnp.where(self.live, self.token, num_tokens)  # out of range where nothing is written
        plgpu.store(
            self.out_ref.at[to_token[:, None], self.head[:, None], self.channel[None, :]],
            heads.astype(self.out_ref.dtype),
            mask=self.inside & jnp.broadcast_to(self.live[:, None], self.inside.shape),
        )


def head_tile(out_ref: Any, block: jax.Array, step: int) -> HeadTile:
    """Heads block * step on, counted through all tokens."""
    num_tokens, num_heads, head_dim = out_ref.shape
    row = block * step + jnp.arange(step, dtype=jnp.int32)
    live = row < num_tokens * num_heads
    row = jnp.minimum(row, num_tokens * num_heads - 1)
    channel = jnp.arange(next_power_of_two(head_dim), dtype=jnp.int32)
    inside = jnp.broadcast_to((channel < head_dim)[None, :], (step, channel.shape[0]))
    return HeadTile(out_ref, lax.div(row, num_heads), lax.rem(row, num_heads), live, channel, inside)


def norm_and_turn(
    tile: HeadTile, load: Callable[[jax.Array], jax.Array], weight_ref: Any, cos_ref: Any, sin_ref: Any, *, eps: float
) -> jax.Array:
    """float32 [step, len(channel)]: the heads' RMS norm times 1 + weight, rounded to the array's type, then turned.

    Args:
      load: channels -> float32 [step, len(channels)] of the tile's heads, 0 outside; called for the channels and for
        those that they turn against.
    """
    channel, inside = tile.channel, tile.inside
    head_dim, half = tile.out_ref.shape[2], cos_ref.shape[1]
    # the channel that each one turns against; those past 2 * half turn against themselves, by no angle
    partner = jnp.where(channel < half, channel + half, jnp.where(channel < 2 * half, channel - half, channel))
    angle = jnp.where(channel < half, channel, channel - half)
    turns = jnp.broadcast_to((channel < 2 * half)[None, :], inside.shape)
    at = tile.token[:, None], jnp.minimum(angle, half - 1)[None, :]

    def gain(channel: jax.Array) -> jax.Array:
        weight = plgpu.load(weight_ref.at[channel], mask=channel < head_dim, other=0.0)
        return 1.0 + weight.astype(jnp.float32)

    # all loads come before the mean, behind whose barrier they would have to wait
    gains, cos = (gain(channel), gain(partner)), plgpu.load(cos_ref.at[at], mask=turns, other=1.0)
    sin = plgpu.load(sin_ref.at[at], mask=turns, other=0.0)
    x, other = load(channel), load(partner)
    inverse = lax.rsqrt(jnp.sum(x * x, axis=1) / head_dim + eps)[:, None]

    def normed(x: jax.Array, gain: jax.Array) -> jax.Array:
        return (x * inverse * gain[None, :]).astype(tile.out_ref.dtype).astype(jnp.float32)

    return normed(x, gains[0]) * cos + normed(other, gains[1]) * jnp.where((channel < half)[None, :], -sin, sin)
