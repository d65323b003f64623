"""Conversations as MiniMax-M3 sees them: rendering a chat template, and taking reasoning out of the answer.

The template decides where an answer starts. `thinking_mode` "enabled" ends the prompt with `<mm:think>`, "disabled"
ends it with `</mm:think>`, "adaptive" (and None) leaves the choice to the model, which then writes
`<mm:think>reasoning</mm:think>` or a bare `</mm:think>` before its answer. The parsers here take the mode, not the
prompt: M3's instructions contain both markers literally, so a prompt cannot tell whether reasoning is open.
They work on text because a model may write a marker as several ordinary tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

THINK_OPEN = "<mm:think>"
THINK_CLOSE = "</mm:think>"
ROLES = ("root", "system", "developer", "user", "assistant", "tool")
PART_TYPES = ("text", "image", "video")
THINKING_MODES = (None, "enabled", "disabled", "adaptive")

# Names under which clients send past reasoning; templates read the first.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template, run in jinja2's immutable sandbox.

    The environment is the one that transformers gives chat templates: `trim_blocks`, `lstrip_blocks`, loop controls,
    the `generation` tag, `raise_exception(message)`, `strftime_now(format)` and a `tojson` that neither escapes HTML
    nor non-ASCII characters.
    """

    def __init__(self, source: str):
        """Compile `source`. ValueError: it is not a valid jinja2 template; the message gives the line."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking_mode: str | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Render a conversation to the prompt text.

        Args:
            messages: see `validate_messages`.
            tools: JSON descriptions, either `{"type": "function", "function": {"name": ...}}` or the inner object.
            thinking_mode: None, "enabled", "disabled" or "adaptive". None leaves the variable undefined.
            add_generation_prompt: open the assistant's turn at the end.
            variables: further names for the template. What is not JSON reaches it as `<TypeName>`.

        Raises:
            ValueError: invalid arguments, or the template refused them, failed, or broke out of the sandbox's rules.
        """
        validate_thinking_mode(thinking_mode)
        if thinking_mode is not None:
            variables["thinking_mode"] = thinking_mode
        values = {
            **_plain(variables),
            "messages": validate_messages(messages),
            "tools": _validate_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(values)
        except (jinja2.TemplateError, ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"chat template: {error}") from error


def validate_thinking_mode(thinking_mode: str | None) -> None:
    """Raise ValueError unless `thinking_mode` is None, "enabled", "disabled" or "adaptive"."""
    allowed = ", ".join(repr(mode) for mode in THINKING_MODES)
    _check(thinking_mode in THINKING_MODES, f"thinking_mode: must be one of {allowed}, got {thinking_mode!r}")


def validate_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Check a conversation and return it as plain JSON data for a template; the input is left as it was.

    A message is `{"role", "content"}`: a role of `ROLES`, and a string or a list of parts `{"type": "text", "text"}`,
    `{"type": "image"}` or `{"type": "video"}`. An assistant message may also have `reasoning_content` (or `reasoning`,
    `thinking`) and `tool_calls`, and with either of them no content. Keys whose value is None are dropped, arguments
    of tool calls given as JSON text are parsed, and images become placeholders, since no template reads them.

    Raises:
        ValueError: names the message by its index and says what is allowed.
    """
    _check(isinstance(messages, (list, tuple)), f"messages: must be a list of dicts, got {_kind(messages)}")
    _check(len(messages) > 0, "messages: must hold at least one message")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def split_thinking(text: str, thinking_mode: str | None = None) -> tuple[str, str]:
    """Divide a generated text into `(reasoning, content)`, by the mode its prompt was rendered with.

    "enabled": reasoning runs from the start to the first `</mm:think>`, or to the end if the answer was cut off.
    "disabled": everything is content. "adaptive" and None: reasoning only if the text starts with `<mm:think>`.
    A marker at the start that repeats the prompt's, or in adaptive mode a bare `</mm:think>`, is dropped with the
    white space before it. Everything else is kept to the letter, later markers and newlines around the answer too,
    so a turn renders back to the tokens it came from. ValueError: unknown `thinking_mode`.
    """
    reasoning_first, openers = _start(thinking_mode)
    body = text.lstrip()
    for marker, opens_reasoning in openers.items():
        if body.startswith(marker):
            text, reasoning_first = body[len(marker) :], opens_reasoning
            break
    if not reasoning_first:
        return "", text
    reasoning, _, content = text.partition(THINK_CLOSE)
    return reasoning, content


class ThinkingParser:
    """`split_thinking` for a text that arrives in pieces.

    The joined pieces equal `split_thinking` of the joined text, however it was cut. A tail that may turn out to be
    a marker is held back, so no part of a marker is ever returned as text.

    Attributes:
        in_reasoning: whether the text returned last belongs to reasoning that is still open.
    """

    def __init__(self, thinking_mode: str | None = None):
        """ValueError: unknown `thinking_mode`."""
        self.in_reasoning, self._openers = _start(thinking_mode)
        self._at_start = True
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """Take the next piece and return the new `(reasoning, content)`, either or both empty."""
        self._held += text
        if self._at_start and not self._leave_start():
            return "", ""
        if not self.in_reasoning:
            return "", self._take(len(self._held))
        at = self._held.find(THINK_CLOSE)
        if at < 0:
            return self._take(len(self._held) - marker_tail(self._held, THINK_CLOSE)), ""
        reasoning = self._take(at)
        self._take(len(THINK_CLOSE))
        self.in_reasoning = False
        return reasoning, self._take(len(self._held))

    def finish(self) -> tuple[str, str]:
        """Return what is held back, as `(reasoning, content)`: the text has ended, so it was no marker."""
        self._at_start = False
        rest = self._take(len(self._held))
        return (rest, "") if self.in_reasoning else ("", rest)

    def _leave_start(self) -> bool:
        """Drop a marker at the start; False while the text so far could still become one."""
        body = self._held.lstrip()
        for marker, opens_reasoning in self._openers.items():
            if body.startswith(marker):
                self._held, self.in_reasoning = body[len(marker) :], opens_reasoning
                break
        else:
            if any(marker.startswith(body) for marker in self._openers):
                return False
        self._at_start = False
        return True

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken


def _start(thinking_mode: str | None) -> tuple[bool, dict[str, bool]]:
    """Whether output starts inside reasoning, and the markers it may open with -> whether they open reasoning."""
    validate_thinking_mode(thinking_mode)
    if thinking_mode == "enabled":
        return True, {THINK_OPEN: True}
    if thinking_mode == "disabled":
        return False, {THINK_CLOSE: False}
    return False, {THINK_OPEN: True, THINK_CLOSE: False}


def marker_tail(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker`, without being all of it."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)


def _check(valid: bool, error: str) -> None:
    if not valid:
        raise ValueError(error)


def _message(where: str, message: Any) -> dict[str, Any]:
    _check(isinstance(message, Mapping), f"{where}: must be a dict, got {_kind(message)}")
    message = {key: _plain(value) for key, value in message.items() if value is not None}
    role = message.get("role")
    _check(role in ROLES, f"{where}.role: must be one of {', '.join(ROLES)}, got {role!r}")
    for key in _REASONING_KEYS:
        if role == "assistant" and key in message:
            _check(isinstance(message[key], str), f"{where}.{key}: must be str, got {_kind(message[key])}")
            message.setdefault("reasoning_content", message[key])
    if "tool_calls" in message:
        _check(role == "assistant", f"{where}.tool_calls: only allowed for role assistant, not {role}")
        message["tool_calls"] = _tool_calls(f"{where}.tool_calls", message["tool_calls"])
    if "content" in message:
        _check_content(f"{where}.content", message["content"])
    else:
        complete = message.get("tool_calls") or "reasoning_content" in message
        _check(bool(complete), f"{where}.content: missing; must be a string or a list of parts")
    return message


def _check_content(where: str, content: Any) -> None:
    if isinstance(content, str):
        return
    _check(isinstance(content, list), f"{where}: must be a string or a list of parts, got {_kind(content)}")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        allowed = ", ".join(PART_TYPES)
        _check(kind in PART_TYPES, f"{where}[{i}].type: must be one of {allowed}, got {kind!r}")
        text = part.get("text") if kind == "text" else ""
        _check(isinstance(text, str), f"{where}[{i}].text: must be str, got {_kind(text)}")


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    _check(isinstance(calls, list), f"{where}: must be a list, got {_kind(calls)}")
    checked = []
    for i, call in enumerate(calls):
        function = _function(f"{where}[{i}]", call)
        arguments = function.get("arguments") or {}
        with suppress(ValueError):  # text that is not JSON stays text, and is refused below
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        allowed = "must be a dict or the JSON text of an object"
        _check(isinstance(arguments, dict), f"{where}[{i}].arguments: {allowed}")
        function = {**function, "arguments": arguments}
        checked.append({**call, "function": function} if "function" in call else function)
    return checked


def _validate_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    _check(isinstance(tools, (list, tuple)), f"tools: must be a list of dicts, got {_kind(tools)}")
    for i, tool in enumerate(tools):
        _function(f"tools[{i}]", tool)
    return _plain(tools)


def _function(where: str, value: Any) -> Mapping[str, Any]:
    """The function object of a tool or of a call, whether wrapped in `function` or bare."""
    function: Any = value.get("function", value) if isinstance(value, Mapping) else None
    named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
    _check(named, f"{where}: must be a dict with function.name, or with name")
    return function


def _kind(value: Any) -> str:
    return type(value).__name__


def _plain(value: Any) -> Any:
    """A copy of `value` in exact JSON types: objects with methods of their own could do harm inside a template."""
    return json.loads(json.dumps(value, default=_stand_in, skipkeys=True))


def _stand_in(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else f"<{_kind(value)}>"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain set

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)
