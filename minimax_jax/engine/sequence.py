"""One answer in the making, on the host: its tokens, what of it is in the caches, and where."""

from __future__ import annotations

import enum
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
from jaxtyping import Int

from minimax_jax.cache import SequencePages
from minimax_jax.engine.sampling_params import SamplingParams
from minimax_jax.engine.sequence_text import SequenceText

NO_SLOT = -1


class Status(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # for pages and a place in the batch, at first or again
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A prompt and the tokens that follow it.

    The tokens are 0 .. num_tokens - 1. The values of the last `num_pending` of them are still on the device: steps that
    choose them were launched and their results not yet read.

    Attributes:
      order: (arrival of the request, number of the answer); lower ones come first.
      params: how to sample.
      num_prompt: tokens of the prompt.
      max_new: tokens after which the answer ends.
      num_known: tokens whose values the host knows.
      num_pending: further ones that were chosen on the device.
      num_computed: tokens whose keys and values are in the caches, or will be after the steps launched so far.
      pages: where.
      slot: its row in the device's state while it runs, else NO_SLOT.
      status: see `Status`.
      parent: the running sequence whose prompt it may share.
      times_preempted: how often it lost its pages.
      found: tokens that its first start did not have to compute, None before it.
      group: the data rank whose pages it uses.
      text: of the answer, None without a tokenizer.
      streams: whether somebody wants to see every token as soon as it is there.
      logprobs, prompt_logprobs: what was asked about the tokens so far, of each a `TokenLogprobs` of Python numbers.
      finish_reason: "stop", "length", "abort" or "error" once it is finished.
      stop_reason: the token id or string of the request that ended it.
      error: what went wrong.
    """

    def __init__(
        self,
        prompt: Int[np.ndarray, "L"],
        params: SamplingParams,
        *,
        order: tuple[int, int],
        max_new: int,
        seed: int = 0,
        parent: Sequence | None = None,
        text: SequenceText | None = None,
        streams: bool = False,
    ):
        """
        Args:
          prompt: at least one token id.
          seed: of its draws; the number of the answer chooses the stream.
        """
        self.order, self.params, self.max_new, self.parent = order, params, max_new, parent
        self.seed, self.streams = seed, streams
        self.num_prompt = self.num_known = len(prompt)
        self._tokens = np.empty(len(prompt) + min(max_new, 64), np.int32)
        self._tokens[: len(prompt)] = prompt
        self.num_pending = self.num_computed = 0
        self.pages: SequencePages | None = None
        self.slot = NO_SLOT
        self.status = Status.WAITING
        self.times_preempted = 0
        self.found: int | None = None
        self.group = 0
        self.text = text
        self.logprobs: list[Any] = []
        self.prompt_logprobs: dict[int, Any] = {}
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: Exception | None = None

    @property
    def known(self) -> Int[np.ndarray, "L"]:
        """The tokens that the host knows; a view."""
        return self._tokens[: self.num_known]

    @property
    def output(self) -> Int[np.ndarray, "L"]:
        """Those of them that are new; a view."""
        return self._tokens[self.num_prompt : self.num_known]

    @property
    def num_tokens(self) -> int:
        """All tokens, pending ones included."""
        return self.num_known + self.num_pending

    @property
    def num_new(self) -> int:
        """New tokens, pending ones included."""
        return self.num_tokens - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that may still be chosen."""
        return self.max_new - self.num_new

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the next one can be chosen; 0 once enough were chosen."""
        num_tokens = self.num_known + self.num_pending
        return 0 if num_tokens - self.num_prompt >= self.max_new else num_tokens - self.num_computed

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.status is Status.FINISHED

    def unread(self) -> None:
        """The steps that chose the pending tokens were lost; they are chosen again, and alike."""
        self.num_pending = 0

    def append(self, token: int) -> None:
        """The value of the oldest pending token has arrived."""
        self.extend((token,))

    def extend(self, tokens: Rows[int]) -> None:
        """The values of the oldest pending tokens have arrived."""
        end = self.num_known + len(tokens)
        if end > len(self._tokens):
            room = min(max(2 * len(self._tokens), end), self.num_prompt + self.max_new)
            grown = np.empty(room, np.int32)
            grown[: self.num_known] = self.known
            self._tokens = grown
        self._tokens[self.num_known : end] = tokens
        self.num_known = end
        self.num_pending -= len(tokens)
