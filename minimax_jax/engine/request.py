"""One request: a prompt, its answers, and who is told of them."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from minimax_jax.engine.outputs import GrowingAnswer, RequestMetrics, RequestOutput
from minimax_jax.engine.sampling_params import SamplingParams
from minimax_jax.engine.sequence import Sequence
from minimax_jax.engine.sequence_text import SequenceText
from minimax_jax.tokenizer import Tokenizer


class Request:
    """What `LLM` hands to the engine.

    Attributes:
      request_id, prompt, token_ids, params: as they were given.
      sequences: its answers in the making.
      error: why it could not begin, or what ended it.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams,
        *,
        arrival: int,
        seed: int,
        max_seq_len: int,
        vocab_size: int,
        tokenizer: Tokenizer | None,
        error: Exception | None = None,
        streams: bool = False,
    ):
        """Checks the request; what is wrong with it becomes its `error`, and it has no sequences then.

        Args:
          arrival: earlier ones go first.
          max_seq_len: tokens that prompt and answer have room for.
          streams: whether every token is wanted as soon as it is there.
        """
        self.request_id, self.prompt, self.token_ids, self.params = request_id, prompt, token_ids, params
        self._tokenizer = tokenizer
        self.sequences: list[Sequence] = []
        self._answers: list[GrowingAnswer] = []
        self._error = error
        self._metrics = RequestMetrics(time.monotonic())
        if error is None:
            try:
                self._check(max_seq_len, vocab_size)
            except (ValueError, TypeError) as problem:
                self._error = problem
        if self._error is not None:
            return
        room = max_seq_len - len(token_ids)
        most = room if params.max_tokens is None else min(params.max_tokens, room)
        ids = np.array(token_ids, np.int32)
        for index in range(params.n):
            parent = self.sequences[0] if self.sequences else None
            order = (arrival, index)
            text = self._text()
            self.sequences.append(
                Sequence(ids, params, order=order, max_new=most, seed=seed, parent=parent, text=text, streams=streams)
            )

        token_text = None if tokenizer is None else lambda token: tokenizer.decode([token], skip_special_tokens=False)
        self._answers = [GrowingAnswer(index, sequence, token_text) for index, sequence in enumerate(self.sequences)]

    def _check(self, max_seq_len: int, vocab_size: int) -> None:
        if not self.token_ids:
            raise ValueError("the prompt is empty: it needs at least one token")
        if len(self.token_ids) >= max_seq_len:
            raise ValueError(
                f"the prompt has {len(self.token_ids)} tokens: must be at most {max_seq_len - 1}, which leaves room "
                f"for one more (max_seq_len, or what the pages hold, is {max_seq_len})"
            )
        for place, token_id in enumerate(self.token_ids):
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"prompt[{place}] = {token_id}: must be a token id within 0..{vocab_size - 1}")
        self.params.check_vocabulary(vocab_size)
        if self.params.stop and self._tokenizer is None:
            raise ValueError(f"stop = {self.params.stop!r}: this model came without a tokenizer, so there is no text")

    def _text(self) -> SequenceText | None:
        params = self.params
        if self._tokenizer is None or not params.detokenize:
            return None
        return SequenceText(
            self._tokenizer,
            params.stop,
            skip_special_tokens=params.skip_special_tokens,
            keep_stop=params.include_stop_str_in_output,
        )

    @property
    def error(self) -> Exception | None:
        """What ended the request, or kept it from beginning."""
        return self._error or next((s.error for s in self.sequences if s.error is not None), None)

    def note_time(self) -> None:
        """To be called when an answer grew or ended."""
        now = time.monotonic()
        if self._metrics.first_token is None and any(len(sequence.output) for sequence in self.sequences):
            self._metrics = dataclasses.replace(self._metrics, first_token=now)
        if self._metrics.finished is None and self.finished:
            self._metrics = dataclasses.replace(self._metrics, finished=now)

    def fail(self, error: Exception, reason: str) -> None:
        """Ends it from outside. Text that was held back, since a stop string might have begun, is text of the answer.

        Args:
          reason: the `finish_reason` of its answers that were not done, "abort" or "error".
        """
        self._error = error
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = reason
                if sequence.text is not None:
                    sequence.text.finish(search=False)

    @property
    def finished(self) -> bool:
        """Whether all answers are, or there will be none."""
        return self._error is not None or all(sequence.finished for sequence in self.sequences)

    def output(self) -> RequestOutput:
        """As it is now; a copy that does not change any more."""
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.token_ids,
            outputs=[answer.output() for answer in self._answers],
            finished=self.finished,
            prompt_logprobs=self._answers[0].prompt_logprobs() if self._answers else None,
            num_cached_tokens=(self.sequences[0].found or 0) if self.sequences else 0,
            metrics=self._metrics,
            error=self.error,
        )
