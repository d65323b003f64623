"""What a request gives, in the shape that vLLM's users know."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from minimax_jax.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class Logprob:
    """One token's log probability.

    Attributes:
      rank: its place among all tokens, from 1 on.
      decoded_token: its text alone; None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One answer.

    Attributes:
      index: which of the request's `n`.
      text, token_ids: so far; an end-of-text or stop token is among the ids.
      logprobs: for each token, those of itself and of the likeliest, by token id; None if not asked for.
      cumulative_logprob: the sum of the tokens' own; None likewise.
      finish_reason: "stop", "length", "abort", "error", or None while it runs.
      stop_reason: the stop string or stop token id that ended it, if it was one.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """When things happened, in seconds of `time.monotonic`; None for what has not.

    Attributes:
      arrival: the request was made; first_token: the host had its first token; finished: it was done.
    """

    arrival: float
    first_token: float | None = None
    finished: float | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A request and its answers.

    Attributes:
      prompt: the text, if the request was one.
      prompt_logprobs: as `CompletionOutput.logprobs`, None for the first token; None if not asked for.
      outputs: the answers, by index.
      finished: whether all are.
      num_cached_tokens: of the prompt, that were found in the caches.
      metrics: when what happened.
      error: what ended the request, if it is one of the things that should not happen.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: Exception | None = None


class GrowingAnswer:
    """Makes outputs of a sequence as it grows: what is new is looked at once, and the rest kept from the last time."""

    def __init__(self, index: int, sequence: Sequence, token_text: Callable[[int], str] | None):
        """
        Args:
          token_text: a token's text alone; None without a tokenizer.
        """
        self._index, self._sequence, self._token_text = index, sequence, token_text
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] = []
        self._prompt_logprobs: list[dict[int, Logprob] | None] = [None]
        self._total = 0.0

    def output(self) -> CompletionOutput:
        """The answer as it is now; the lists are the caller's own."""
        sequence = self._sequence
        self._token_ids += sequence.output[len(self._token_ids) :].tolist()
        most = sequence.params.logprobs
        if most is not None:
            first = len(self._logprobs)
            for scores, token in zip(sequence.logprobs[first:], self._token_ids[first:], strict=False):
                self._logprobs.append(_logprobs(scores, token, most, self._token_text))
                self._total += scores.own
        return CompletionOutput(
            index=self._index,
            text="" if sequence.text is None else sequence.text.text,
            token_ids=self._token_ids.copy(),
            logprobs=None if most is None else self._logprobs.copy(),
            cumulative_logprob=None if most is None else self._total,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """Of the prompt's tokens, as far as they are computed."""
        sequence, found = self._sequence, self._prompt_logprobs
        most = sequence.params.prompt_logprobs
        if most is None:
            return None
        while len(found) < sequence.num_prompt and len(found) in sequence.prompt_logprobs:
            scores = sequence.prompt_logprobs[len(found)]
            found.append(_logprobs(scores, int(sequence.known[len(found)]), most, self._token_text))
        return found.copy()


def _logprobs(scores: Any, token: int, most: int, token_text: Callable[[int], str] | None) -> dict[int, Logprob]:
    text = (lambda _: None) if token_text is None else token_text
    best = zip(scores.top_ids[:most], scores.top[:most], strict=True)
    found = {top: Logprob(value, rank, text(top)) for rank, (top, value) in enumerate(best, 1)}
    found.setdefault(token, Logprob(scores.own, scores.ranks, text(token)))
    return found
