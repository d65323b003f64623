"""An answer taken apart: reasoning, content and tool calls, whole or as it streams."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from minimax_jax.chat import ThinkingParser
from minimax_jax.tool_calls import ToolCall, ToolCallParser


@dataclasses.dataclass(frozen=True)
class Answer:
    """Parts of an answer, or what a piece of one added to them.

    Attributes:
      reasoning: between the thinking markers; content: after them, without the tool calls.
    """

    reasoning: str
    content: str
    tool_calls: list[ToolCall]


class AnswerParser:
    """Takes an answer apart as it arrives. The joined parts are the same however the text was cut."""

    def __init__(self, thinking_mode: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None):
        """
        Args:
          thinking_mode, tools: as the prompt was rendered with.

        Raises:
          ValueError: for an unknown thinking mode.
        """
        self._thinking, self._calls = ThinkingParser(thinking_mode), ToolCallParser(tools)

    def push(self, text: str) -> Answer:
        """What the next piece of text adds."""
        reasoning, content = self._thinking.push(text)
        return Answer(reasoning, *self._calls.push(content))

    def finish(self) -> Answer:
        """What was held back: the text has ended."""
        reasoning, content = self._thinking.finish()
        more, calls = self._calls.push(content)
        rest, last = self._calls.finish()
        return Answer(reasoning, more + rest, calls + last)


def parse_answer(
    text: str, thinking_mode: str | None = None, tools: Sequence[Mapping[str, Any]] | None = None
) -> Answer:
    """A whole answer; see `AnswerParser`."""
    parser = AnswerParser(thinking_mode, tools)
    parts = (parser.push(text), parser.finish())
    return Answer(
        "".join(part.reasoning for part in parts),
        "".join(part.content for part in parts),
        [call for part in parts for call in part.tool_calls],
    )
