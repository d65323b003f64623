"""What a launch will give: tokens, and what was asked about them, which may not be there yet."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Int

from minimax_jax.engine.logprobs import TokenLogprobs
from minimax_jax.engine.scheduler import StepPlan
from minimax_jax.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class PromptScores:
    """Log probabilities of some tokens of a prompt.

    Attributes:
      first, count: which tokens of the sequence; scores: of these, padding after them.
    """

    sequence: Sequence
    first: int
    count: int
    scores: TokenLogprobs


@dataclasses.dataclass(frozen=True)
class LaunchedStep:
    """A step, or several, whose results may still be in the making.

    Attributes:
      plans: what it computes, by data rank; num_rows: rows of each data rank, padding included.
      tokens: the tokens that each row chose.
      logprobs: of these, [R, steps, ...]; None if nobody asked.
      prompt_scores: of prompts that asked.
      kind: "decode" or "prefill"; how: "whole", "segmented" or "eager".
    """

    plans: tuple[StepPlan, ...]
    num_rows: int
    tokens: Int[Array, "R steps"]
    logprobs: TokenLogprobs | None
    prompt_scores: tuple[PromptScores, ...]
    kind: str
    how: str
