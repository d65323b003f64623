"""SamplingParams: what one request asks of the sampler, under the names that vLLM's users know."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from minimax_jax.engine.generation_config import COLDEST
from minimax_jax.integers import as_integer, integer_within

MOST_LOGPROBS = 20
MOST_CHOICES = 64
MOST_BIASES = 300
MOST_STOPS = 300
_MOST_INT = 2**31 - 1
_LEAST_FLOAT, _MOST_FLOAT = 1e-37, 3e38  # the sampler's are float32, where a smaller number may be 0


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen, when it ends, and what comes back.

    Attributes:
      n: answers to the prompt, each with draws of its own.
      max_tokens: new tokens of an answer; None for what room there is.
      min_tokens: before so many, no token that would end the answer is chosen. Stop strings are not looked for either.
      temperature: 0 is greedy.
      top_p: the fewest likeliest tokens whose probabilities reach it; 1 for all.
      top_k: so many likeliest tokens; 0 or -1 for all.
      min_p: tokens at least so likely relative to the likeliest one.
      repetition_penalty: divides the positive logits of tokens that prompt or answer hold, and multiplies the others.
      presence_penalty, frequency_penalty: taken off the logits of tokens in the answer, once or each time.
      logit_bias: added to the logits of token ids.
      seed: of the draws, 0 .. 2**32 - 1; None for another one each time. With a seed, the tokens depend on the prompt
        and these parameters alone, whatever else runs.
      stop: strings that end the answer, which is cut before them.
      stop_token_ids: further ids that end it.
      ignore_eos: whether it goes on after the model's end-of-text tokens.
      include_stop_str_in_output: whether a stop string stays.
      logprobs: of each token, its own log probability and those of so many likeliest tokens, from the model's own
        logits; None for none.
      prompt_logprobs: the same for the prompt's tokens.
      detokenize: whether there is text.
      skip_special_tokens: whether the text leaves out special tokens.

    Raises:
      ValueError: for values out of range; the message names the field and what is allowed.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._put(stop=(self.stop,) if isinstance(self.stop, str) else self._tuple("stop", "a string or strings"))
        self._put(stop_token_ids=self._tuple("stop_token_ids", "token ids"))
        self._put(top_k=0 if _is_int(self.top_k, -1, -1) else self.top_k)
        self._require(_is_int(self.n, 1, MOST_CHOICES), "n", f"an integer within 1..{MOST_CHOICES}")
        fine = self.max_tokens is None or _is_int(self.max_tokens, 1)
        self._require(fine, "max_tokens", f"an integer within 1..{_MOST_INT}, or None")
        most = math.inf if self.max_tokens is None else self.max_tokens
        self._require(_is_int(self.min_tokens, 0, most), "min_tokens", "an integer within 0..max_tokens")
        self._require(_is_number(self.temperature, 0), "temperature", "a number >= 0 (0 is greedy)")
        self._require(_is_number(self.top_p, 0, 1) and self.top_p > 0, "top_p", "a number in (0, 1]")
        self._require(_is_int(self.top_k, 0), "top_k", "an integer >= 0, or -1 (0 and -1 switch it off)")
        self._require(_is_number(self.min_p, 0, 1), "min_p", "a number in [0, 1]")
        positive = _is_number(self.repetition_penalty, _LEAST_FLOAT)
        self._require(positive, "repetition_penalty", f"a number > 0, at least {_LEAST_FLOAT}")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(_is_number(getattr(self, name), -2, 2), name, "a number in [-2, 2]")
        self._require(
            self.seed is None or _is_int(self.seed, 0, 2**32 - 1), "seed", f"an integer within 0..{2**32 - 1}"
        )
        self._require(all(isinstance(s, str) and s for s in self.stop), "stop", "a string or strings, none empty")
        self._require(all(_is_int(i, 0) for i in self.stop_token_ids), "stop_token_ids", "token ids >= 0")
        self._require(len(self.stop_token_ids) <= MOST_STOPS, "stop_token_ids", f"at most {MOST_STOPS} ids")
        self._require(self.detokenize or not self.stop, "stop", "empty without detokenize")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            allowed = f"an integer within 0..{MOST_LOGPROBS}, or None"
            self._require(value is None or _is_int(value, 0, MOST_LOGPROBS), name, allowed)
        for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens"):
            self._require(isinstance(getattr(self, name), bool | np.bool_), name, "True or False")
        self._check_biases()
        # NumPy's narrow integers do not hold what is added to them
        for name in ("n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"):
            self._put(**{name: as_integer(getattr(self, name))})
        self._put(stop_token_ids=tuple(map(as_integer, self.stop_token_ids)))

    def _tuple(self, name: str, allowed: str) -> tuple[Any, ...]:
        """A field's values; none for None."""
        value = getattr(self, name)
        try:
            return () if value is None else tuple(value)
        except TypeError:
            raise ValueError(f"{name} = {value!r}: must be {allowed}") from None

    def _put(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _require(self, holds: bool, name: str, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} = {getattr(self, name)!r}: must be {allowed}")

    def _check_biases(self) -> None:
        fine = self.logit_bias is None or isinstance(self.logit_bias, Mapping)
        self._require(fine, "logit_bias", "a dict of token ids >= 0 with numbers in [-100, 100]")
        biases = dict(self.logit_bias or {})
        fine = all(_is_int(i, 0) and _is_number(bias, -100, 100) for i, bias in biases.items())
        self._require(fine, "logit_bias", "token ids >= 0 with numbers in [-100, 100]")
        self._require(len(biases) <= MOST_BIASES, "logit_bias", f"at most {MOST_BIASES} tokens")
        self._put(logit_bias={as_integer(i): bias for i, bias in biases.items()} or None)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if an id that is named is no token."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias or ())):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise ValueError(f"{name} has token id {token_id}: must be within 0..{vocab_size - 1}")

    def ends(self, end_ids: Iterable[int]) -> tuple[int, ...]:
        """The tokens that end an answer, of which `end_ids` are the model's end-of-text tokens."""
        return tuple(self.stop_token_ids) if self.ignore_eos else (*self.stop_token_ids, *end_ids)

    @property
    def greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return self.temperature < COLDEST

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _is_int(value: Any, least: float, most: float = _MOST_INT) -> bool:
    return integer_within(value, least, most) is not None


def _is_number(value: Any, least: float, most: float = _MOST_FLOAT) -> bool:
    if isinstance(value, bool):
        return False
    try:
        return least <= float(value) <= most
    except (TypeError, ValueError):
        return False
