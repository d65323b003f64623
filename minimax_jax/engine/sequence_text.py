"""The text of one answer as its tokens come: characters are never split, stop strings are found and cut off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from minimax_jax.chat import marker_tail
from minimax_jax.tokenizer import TextStream, Tokenizer


class SequenceText:
    """Grows by one token at a time; the work for each does not depend on how many came before.

    Attributes:
      text: all that is certain and will not be cut off by a stop string any more.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        skip_special_tokens: bool = True,
        keep_stop: bool = False,
    ):
        """
        Args:
          stop: strings that end the answer.
          keep_stop: whether the stop string stays in the text.
        """
        self._stream = TextStream(tokenizer, skip_special_tokens)
        self._stop, self._keep_stop = tuple(stop), keep_stop
        self._pieces: list[str] = []
        self._held = ""  # may be the beginning of a stop string

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def push(self, token_id: int, *, search: bool = True) -> str | None:
        """Takes a token; returns the stop string that it completed, if any, at which the text ends.

        Args:
          search: whether stop strings count already (`min_tokens`).
        """
        return self._take(self._stream.push(token_id), search)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Takes tokens of an answer that no string can end."""
        assert not self._stop
        self._pieces.append(self._stream.extend(token_ids))

    def finish(self, *, search: bool = True) -> str | None:
        """No more tokens will come: what was held back is text, too."""
        found = self._take(self._stream.finish(), search)
        if found is None:
            self._pieces.append(self._held)
            self._held = ""
        return found

    def _take(self, piece: str, search: bool) -> str | None:
        if not self._stop or not search:
            self._pieces.append(self._held + piece)
            self._held = ""
            return None
        self._held += piece
        places = [(place, stop) for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if places:
            place, stop = min(places)
            self._pieces.append(self._held[: place + len(stop) if self._keep_stop else place])
            self._held = ""
            return stop
        kept = max(marker_tail(self._held, stop) for stop in self._stop)
        cut = len(self._held) - kept
        self._pieces.append(self._held[:cut])
        self._held = self._held[cut:]
        return None
