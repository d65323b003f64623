"""What the device remembers of each running sequence from step to step, and how it changes the logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowState:
    """One row a slot.

    Attributes:
      last_tokens: the newest token, which the host may not have read yet.
      output_counts: how often each token stands in the answer; kept for rows with penalties only.
      in_prompt: whether it stands in the prompt; the same.
    """

    last_tokens: Int[Array, "S"]
    output_counts: Int[Array, "S V"]
    in_prompt: Bool[Array, "S V"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adjustments:
    """Changes to the logits of each row, before anything is picked.

    Attributes:
      repetition, presence, frequency: penalties; 1, 0 and 0 do nothing.
      bias_ids, bias_values: added to single logits; M is 0 where no row has any, ids of V or more do nothing.
      ends: tokens that end the row; ids of V or more are none.
      ends_from: the first position at which one of them may be chosen.
    """

    repetition: Float[Array, "R"]
    presence: Float[Array, "R"]
    frequency: Float[Array, "R"]
    bias_ids: Int[Array, "R M"]
    bias_values: Float[Array, "R M"]
    ends: Int[Array, "R E"]
    ends_from: Int[Array, "R"]


def empty_rows(num_slots: int, vocab_size: int) -> RowState:
    """State of slots that nobody has taken."""
    shape = (num_slots, vocab_size)
    return RowState(jnp.zeros(num_slots, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


def begin_row(state: RowState, slot: Int[Array, "1"], prompt: Int[Array, "L"], output: Int[Array, "M"]) -> RowState:
    """Counts a sequence's tokens for a slot that it takes.

    Args:
      slot: S or more for none.
      prompt, output: ids of V or more are padding.
    """
    counts = jnp.zeros(state.output_counts.shape[1], jnp.int32).at[output].add(1, mode="drop")
    seen = jnp.zeros(state.in_prompt.shape[1], bool).at[prompt].set(True, mode="drop")
    return dataclasses.replace(
        state,
        output_counts=state.output_counts.at[slot[0]].set(counts, mode="drop"),
        in_prompt=state.in_prompt.at[slot[0]].set(seen, mode="drop"),
    )


def record_tokens(state: RowState, slots: Int[Array, "R"], tokens: Int[Array, "R"], *, counted: bool) -> RowState:
    """The state once the rows' tokens were chosen; slots of S or more choose nothing.

    Args:
      counted: static; whether any row has penalties.
    """
    counts = state.output_counts.at[slots, tokens].add(1, mode="drop") if counted else state.output_counts
    last = state.last_tokens.at[slots].set(tokens, mode="drop")
    return dataclasses.replace(state, last_tokens=last, output_counts=counts)


def adjust_logits(
    logits: Float[Array, "R V"],
    state: RowState,
    slots: Int[Array, "R"],
    positions: Int[Array, "R"],
    changes: Adjustments,
    *,
    penalized: bool,
    held: bool,
) -> Float[Array, "R V"]:
    """Logits with penalties and biases.

    Args:
      slots: of the rows; positions: where their new tokens will stand.
      penalized: static; whether any row has penalties.
      held: static; whether any row may not end yet.
    """
    rows = jnp.arange(logits.shape[0])[:, None]
    if penalized:
        counts = state.output_counts.at[slots].get(mode="clip")
        in_output = counts > 0
        seen = in_output | state.in_prompt.at[slots].get(mode="clip")
        penalty = jnp.where(seen, changes.repetition[:, None], 1)
        logits = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = logits - changes.frequency[:, None] * counts - changes.presence[:, None] * in_output
    if changes.bias_ids.shape[1]:
        logits = logits.at[rows, changes.bias_ids].add(changes.bias_values, mode="drop")
    if held:
        banned = jnp.where(positions[:, None] < changes.ends_from[:, None], changes.ends, logits.shape[1])
        logits = logits.at[rows, banned].set(-jnp.inf, mode="drop")
    return logits
