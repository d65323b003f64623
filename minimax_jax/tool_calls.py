"""Tool calls in MiniMax-M3's grammar, taken out of generated text, whole or as it streams.

With NS = `]<]minimax[>[`:

    NS<tool_call>
    NS<invoke name="f">NS<argument>value NS</argument> ...NS</invoke>
    NS</tool_call>

(without the spaces). Objects are tags inside tags, array elements are `item` tags, null fields are left out. Values
carry no types: these come from the tool's JSON schema alone, and what has no schema stays text. One block holds all
calls of an answer; what follows it is dropped. The parser works on text, since a model may write a marker as several
ordinary tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from minimax_jax.chat import marker_tail

NAMESPACE = "]<]minimax[>["
BLOCK_OPEN, BLOCK_CLOSE = f"{NAMESPACE}<tool_call>", f"{NAMESPACE}</tool_call>"
INVOKE_CLOSE = f"{NAMESPACE}</invoke>"
_INVOKE = re.compile(re.escape(NAMESPACE) + r'<invoke\s+name\s*=\s*"([^"]*)"\s*>')
_TAG = re.compile(r"<(/?)([^<>]+)>")
_ITEM, _TEXT = "item", "$text"
_DEPTH = 64  # of tags, and of choices in a schema


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of one tool.

    Attributes:
      arguments: by name, of the types that the tool's schema names.
    """

    name: str
    arguments: dict[str, Any]

    def as_message_part(self) -> dict[str, Any]:
        """For `tool_calls` of an assistant message; the arguments are JSON text, as clients expect."""
        arguments = json.dumps(self.arguments, ensure_ascii=False)
        return {"type": "function", "function": {"name": self.name, "arguments": arguments}}


class ToolCallParser:
    """Content and calls of a text that arrives in pieces, the same however it was cut.

    A tail that may turn out to be the block's marker is held back. A call is given once it is complete.

    Attributes:
      incomplete: after `finish`, whether the text ended inside the block.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None):
        """
        Args:
          tools: as for the chat template: JSON descriptions, bare or under "function".
        """
        functions = [tool.get("function", tool) for tool in tools or ()]
        self._schemas: dict[Any, Any] = {function.get("name"): function.get("parameters") for function in functions}
        self._held, self._state = "", "content"
        self.incomplete = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Takes the next piece; returns new content and the calls that are complete now."""
        self._held += text
        content = ""
        if self._state == "content":
            at = self._held.find(BLOCK_OPEN)
            if at < 0:
                return self._take(len(self._held) - marker_tail(self._held, BLOCK_OPEN)), []
            content = self._take(at)
            self._take(len(BLOCK_OPEN))
            self._state = "block"
        calls = []
        while self._state == "block":
            end, close = self._held.find(INVOKE_CLOSE), self._held.find(BLOCK_CLOSE)
            if end >= 0 and (close < 0 or end < close):
                call = self._invoke(self._take(end))
                self._take(len(INVOKE_CLOSE))
                calls += [call] if call is not None else []
            elif close >= 0:
                self._state = "done"
            else:
                break
        if self._state == "done":
            self._held = ""
        return content, calls

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The text has ended: what was held back is content, unless it stands inside the block."""
        rest, self._held = self._held, ""
        self.incomplete = self._state == "block"
        return (rest if self._state == "content" else ""), []

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        return taken

    def _invoke(self, text: str) -> ToolCall | None:
        """A call from what stands before its closing tag; None if it names no tool."""
        opening = _INVOKE.search(text)
        if opening is None:
            return None
        schema = self._schemas.get(opening.group(1))
        arguments = _Schemas(schema).value(_tree(text[opening.end() :]), schema or {}, as_object=True)
        return ToolCall(opening.group(1), arguments)


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> tuple[str, list[ToolCall]]:
    """(content, calls) of a whole text; see `ToolCallParser`."""
    parser = ToolCallParser(tools)
    content, calls = parser.push(text)
    return content + parser.finish()[0], calls


@dataclasses.dataclass
class _Node:
    """A tag: the text in it, and the tags in it."""

    name: str
    text: str = ""
    children: list[_Node] = dataclasses.field(default_factory=list)


def _tree(text: str) -> _Node:
    """Tags by their markers. A closing tag also closes what was left open in it; one without an opening is text."""
    root = _Node("")
    path = [root]
    first, *pieces = text.split(NAMESPACE)
    root.text = first
    for piece in pieces:
        tag = _TAG.match(piece)
        if tag is None:
            path[-1].text += NAMESPACE + piece
            continue
        closing, name = tag.groups()
        rest = piece[tag.end() :]
        if not closing and len(path) <= _DEPTH:  # deeper ones are text: a model that repeats itself ends no stream
            path.append(_Node(name, rest))
            path[-2].children.append(path[-1])
        elif name in (node.name for node in path[1:]):
            while path.pop().name != name:
                pass
            path[-1].text += rest
        else:
            path[-1].text += NAMESPACE + piece
    return root


class _Schemas:
    """Values of a tree by a JSON schema, whose references are looked up in `root`."""

    def __init__(self, root: Any):
        self._root = root

    def value(self, node: _Node, schema: Any, *, as_object: bool = False) -> Any:
        schema = self._resolved(schema)
        types = _types(schema)
        if as_object or (node.children and not self._is_list(node, types)):
            found = self._object(node, schema)
            return [found] if "array" in types and "object" not in types and not as_object else found
        if node.children:
            return [self.value(child, schema.get("items")) for child in node.children]
        return self._leaf(node.text, schema, types)

    def _is_list(self, node: _Node, types: tuple[str, ...]) -> bool:
        items = all(child.name == _ITEM for child in node.children)
        return items and ("array" in types or "object" not in types)

    def _object(self, node: _Node, schema: Mapping[str, Any]) -> dict[str, Any]:
        properties = schema.get("properties") or {}
        other = schema.get("additionalProperties")
        grouped: dict[str, list[_Node]] = {}
        for child in node.children:
            grouped.setdefault(child.name, []).append(child)
        found: dict[str, Any] = {}
        for name, nodes in grouped.items():
            own = properties.get(name, other)
            if len(nodes) == 1:
                found[name] = self.value(nodes[0], own)
            else:  # a repeated tag is an array
                own = self._resolved(own)
                each = own.get("items") if "array" in _types(own) else own
                found[name] = [self.value(one, each) for one in nodes]
        if node.children and node.text.strip():
            found[_TEXT] = node.text
        return found

    def _leaf(self, text: str, schema: Mapping[str, Any], types: tuple[str, ...]) -> Any:
        for kind in sorted(types, key="string".__eq__):  # text fits last, since everything is one
            if kind == "string":
                return text
            fits, value = _read(text, kind)
            if fits:
                return value
        if not types:
            for allowed in schema.get("enum") or ():
                if text == (allowed if isinstance(allowed, str) else json.dumps(allowed)):
                    return allowed
        if "array" in types and text:
            return [self.value(_Node("", text), schema.get("items"))]
        return text

    def _resolved(self, schema: Any, depth: int = 0) -> Mapping[str, Any]:
        for _ in range(16):  # chains of references end; circles do not
            if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
                break
            target: Any = self._root
            for part in schema["$ref"].removeprefix("#").strip("/").split("/"):
                target = target.get(part) if isinstance(target, Mapping) else None
            schema = target
        if not isinstance(schema, Mapping) or depth > _DEPTH:  # a choice may lead back to itself
            return {}
        if isinstance(schema.get("allOf"), Sequence):
            own = {key: value for key, value in schema.items() if key != "allOf"}
            return self._all_of([own, *schema["allOf"]], depth + 1)
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), Sequence) and "type" not in schema:
                return self._any_of(schema[key], depth + 1)
        return schema

    def _any_of(self, choices: Sequence[Any], depth: int) -> Mapping[str, Any]:
        """One schema that allows what any of several allow."""
        merged: dict[str, Any] = {}
        types: list[str] = []
        for choice in (self._resolved(choice, depth) for choice in choices):
            types += _types(choice)
            merged = {**choice, **merged}
        return {**merged, "type": types}

    def _all_of(self, parts: Sequence[Any], depth: int) -> Mapping[str, Any]:
        """One schema that allows what all of several allow; what two of them say of one thing is joined likewise."""
        merged: dict[str, Any] = {}
        for part in (self._resolved(part, depth) for part in parts):
            for key, value in part.items():
                known = merged.get(key)
                if known is None:
                    merged[key] = value
                elif key == "type":
                    allowed = _types(part)
                    merged[key] = [kind for kind in _types(merged) if kind in allowed or _narrows(kind, allowed)]
                    merged[key] += [kind for kind in allowed if _narrows(kind, _types({"type": known}))]
                elif key == "enum":
                    merged[key] = [one for one in known if one in value]
                elif key == "properties":
                    merged[key] = {**known, **{n: _both(known[n], p) if n in known else p for n, p in value.items()}}
                elif key in ("items", "additionalProperties"):
                    merged[key] = _both(known, value)
        return merged


def _both(first: Any, second: Any) -> Any:
    return {"allOf": [first, second]} if first != second else first


def _narrows(kind: str, allowed: Sequence[str]) -> bool:
    """Whether a kind that is not named is allowed as a part of one that is."""
    return kind == "integer" and "number" in allowed and "integer" not in allowed


def _types(schema: Mapping[str, Any]) -> tuple[str, ...]:
    kinds = schema.get("type") or ()
    return (kinds,) if isinstance(kinds, str) else tuple(kind for kind in kinds if isinstance(kind, str))


_KINDS: dict[str, tuple[type, ...]] = {
    "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),), "array": (list,),
    "object": (dict,),
}  # fmt: skip


def _finite(text: str) -> float:
    """A number that JSON can write again: no NaN, Infinity or 1e999."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not finite")
    return value


def _read(text: str, kind: str) -> tuple[bool, Any]:
    """(whether a text is a JSON value of a kind, that value)."""
    if kind in ("array", "object") and not text.strip():
        return True, [] if kind == "array" else {}
    try:
        value = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError):
        return False, None
    if isinstance(value, bool):
        return kind == "boolean", value
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        return True, int(value)
    return isinstance(value, _KINDS.get(kind, ())), value
