"""What a compiled step gets: its flat tokens, and the rows whose next tokens are picked."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Int

from minimax_jax.buckets import bucket
from minimax_jax.engine.row_state import Adjustments
from minimax_jax.engine.sampler import SamplingState
from minimax_jax.engine.sampling_params import MOST_LOGPROBS
from minimax_kernels import Batch

BAD_LOGITS = -1  # in the place of a token that could not be chosen, because logits were no numbers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """The flat tokens of one step.

    Attributes:
      tokens: their ids, where `sources` is negative.
      sources: the slot whose newest token it is, -1 where the host knew it.
      positions: in their sequences.
      slots: page * B + offset, -1 for padding.
      batch: which rows they belong to.
      last: of each row the flat token whose hidden state decides on the next one.
    """

    tokens: Int[Array, "T"]
    sources: Int[Array, "T"]
    positions: Int[Array, "T"]
    slots: Int[Array, "T"]
    batch: Batch
    last: Int[Array, "R"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PickInputs:
    """The rows of one step whose next tokens are picked.

    Attributes:
      positions: where the new token will stand.
      slots: of the rows; writes: the same for those that choose, S for others.
      sampling, adjustments: how.
    """

    positions: Int[Array, "R"]
    slots: Int[Array, "R"]
    writes: Int[Array, "R"]
    sampling: SamplingState
    adjustments: Adjustments


@dataclasses.dataclass(frozen=True)
class PickFeatures:
    """What of picking any row needs; static, the rest is left out of the executable.

    Attributes:
      greedy: all rows take the most likely token.
      truncated: some cut by top-k, top-p or min-p.
      penalized: some have penalties.
      held: some may not end yet (`min_tokens`).
      num_logprobs: likeliest tokens to report at most, None to report none.
    """

    greedy: bool = True
    truncated: bool = False
    penalized: bool = False
    held: bool = False
    num_logprobs: int | None = None


# Loops of several steps hold all layers, so few of them are compiled: what is asked for is rounded up to one of these.
GREEDY = PickFeatures()
SAMPLED = PickFeatures(greedy=False, truncated=True)
EVERYTHING = PickFeatures(greedy=False, truncated=True, penalized=True, held=True, num_logprobs=bucket(MOST_LOGPROBS))
LOOP_FEATURES = (GREEDY, SAMPLED, EVERYTHING)
