"""Answers taken apart: M3's grammar of tool calls, on every cut of the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_jax.assistant import AnswerParser, parse_answer
from minimax_jax.tokenizer import Tokenizer
from minimax_jax.tool_calls import BLOCK_CLOSE, BLOCK_OPEN, NAMESPACE, ToolCall, ToolCallParser, parse_tool_calls

NS = NAMESPACE
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "scale": {"type": "number"},
        "exact": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "grid": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
        "where": {"$ref": "#/$defs/place"},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "maybe": {"type": ["null", "number"]},
        "level": {"enum": [1, 2, "high"]},
    },
    "$defs": {"place": {"type": "object", "properties": {"lat": {"type": "number"}, "item": {"type": "string"}}}},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}, {"name": "bare"}]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda text: NS not in text)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": TEXT,
        "days": st.integers(),
        "scale": st.floats(allow_nan=False, allow_infinity=False),
        "exact": st.booleans(),
        "tags": st.lists(TEXT, max_size=3),
        "grid": st.lists(st.lists(st.integers(), max_size=2), max_size=3),
        "where": st.fixed_dictionaries({}, optional={"lat": st.integers(-90, 90), "item": TEXT}),
        "either": st.one_of(st.integers(), st.sampled_from(["a", "10 km", ""])),
    },
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained("tiny")


def rendered(tokenizer, arguments, content="Look:"):
    """What the template makes of calls, from the answer's first character on."""
    calls = [{"name": name, "arguments": values} for name, values in arguments]
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content, "tool_calls": calls}]
    text = tokenizer.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=False, tokenize=False)
    return text.rpartition("]~b]ai\n")[2].removesuffix("[e~[\n")


def in_pieces(text, cuts, **options):
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    parser = AnswerParser(**options)
    parts = [parser.push(text[a:b]) for a, b in zip(places, places[1:], strict=False)]  # noqa: RUF007
    parts.append(parser.finish())
    calls = [call for part in parts for call in part.tool_calls]
    return "".join(p.reasoning for p in parts), "".join(p.content for p in parts), calls


@settings(max_examples=60)
@given(st.lists(ARGUMENTS, min_size=1, max_size=3), st.lists(st.integers(0, 10**6), max_size=8))
def test_what_the_template_writes_is_read_back_on_every_cut(tokenizer, arguments, cuts):
    text = rendered(tokenizer, [("weather", values) for values in arguments])
    answer = parse_answer(text, "adaptive", TOOLS)
    assert (answer.reasoning, answer.content) == ("", "Look:")
    assert answer.tool_calls == [ToolCall("weather", values) for values in arguments]
    assert in_pieces(text, cuts, tools=TOOLS) == ("", "Look:", answer.tool_calls)


MARKERS = [NS, "<tool_call>", "</tool_call>", f'{NS}<invoke name="bare">', f"{NS}</invoke>", f"{NS}<a>", f"{NS}</a>"]
PIECES = st.sampled_from([*MARKERS, "<mm:think>", "</mm:think>", "x", "\n", "]<]", "é"])


@settings(max_examples=100)
@given(st.lists(PIECES, max_size=14), st.lists(st.integers(0, 10**6), max_size=8))
def test_any_text_gives_the_same_parts_on_every_cut(pieces, cuts):
    text = "".join(pieces)
    answer = parse_answer(text, None, TOOLS)
    assert in_pieces(text, cuts, tools=TOOLS) == (answer.reasoning, answer.content, answer.tool_calls)


def arguments_of(body, tool="weather", tools=TOOLS):
    content, calls = parse_tool_calls(
        f'{BLOCK_OPEN}\n{NS}<invoke name="{tool}">{body}{NS}</invoke>\n{BLOCK_CLOSE}', tools
    )
    assert content == "" and [call.name for call in calls] == [tool]
    return calls[0].arguments


def tag(name, value):
    return f"{NS}<{name}>{value}{NS}</{name}>"


def test_types_come_from_the_schema_alone():
    assert arguments_of(tag("days", "3") + tag("city", "3") + tag("unknown", "3")) == {
        "days": 3, "city": "3", "unknown": "3",
    }  # fmt: skip
    assert arguments_of(tag("days", "soon")) == {"days": "soon"}  # what does not fit stays text
    assert arguments_of(tag("days", "true")) == {"days": "true"} and arguments_of(tag("days", "2.0")) == {"days": 2}
    assert arguments_of(tag("maybe", "null") + tag("level", "2")) == {"maybe": None, "level": 2}
    assert arguments_of(tag("either", "12") + tag("exact", "false")) == {"either": 12, "exact": False}
    assert arguments_of(tag("a", tag("item", "1") + tag("item", "2")), "bare") == {"a": ["1", "2"]}
    assert arguments_of(tag("a", tag("b", "1")), "none", None) == {"a": {"b": "1"}}


def test_lists_come_as_items_repeated_tags_or_json():
    for body in (
        tag("tags", tag("item", "a") + tag("item", "b")),
        tag("tags", "a") + tag("tags", "b"),
        tag("tags", '["a", "b"]'),
    ):
        assert arguments_of(body) == {"tags": ["a", "b"]}
    assert arguments_of(tag("tags", "")) == {"tags": []} and arguments_of(tag("tags", "a")) == {"tags": ["a"]}
    assert arguments_of(tag("where", "mixed" + tag("lat", "1"))) == {"where": {"lat": 1, "$text": "mixed"}}


def test_calls_come_as_soon_as_they_are_complete_and_the_rest_is_dropped():
    parser = ToolCallParser(TOOLS)
    assert parser.push(f"Hm {NS}<tool_") == ("Hm ", [])
    assert parser.push(f'call>\n{NS}<invoke name="bare">') == ("", [])
    assert parser.push(f"{NS}</invoke>\n") == ("", [ToolCall("bare", {})])
    assert parser.push(f"{BLOCK_CLOSE}and more") == ("", []) and parser.finish() == ("", []) and not parser.incomplete
    cut = ToolCallParser(TOOLS)
    cut.push(f'{BLOCK_OPEN}{NS}<invoke name="bare">{NS}<a>')
    assert cut.finish() == ("", []) and cut.incomplete


def test_thinking_comes_off_first():
    call = f'{BLOCK_OPEN}\n{NS}<invoke name="bare">{NS}</invoke>\n{BLOCK_CLOSE}'
    answer = parse_answer(f"<mm:think>why {BLOCK_OPEN}</mm:think>So:{call}", "adaptive", TOOLS)
    assert answer.reasoning == f"why {BLOCK_OPEN}" and answer.content == "So:"
    assert answer.tool_calls[0].as_message_part() == {
        "type": "function", "function": {"name": "bare", "arguments": "{}"},
    }  # fmt: skip
    with pytest.raises(ValueError, match="thinking_mode: must be one of"):
        AnswerParser("often")


def call_of(inner: str, properties: dict) -> dict:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", **properties}}}]
    _, (call,) = parse_tool_calls(f'{BLOCK_OPEN}{NS}<invoke name="f">{inner}{NS}</invoke>{BLOCK_CLOSE}', tools)
    return call.arguments


def test_a_model_that_repeats_itself_and_odd_schemas_end_no_stream():
    deep = call_of(f"{NS}<a>" * 1500, {})
    for _ in range(60):
        (deep,) = deep.values()
    assert isinstance(deep, (dict, str, list))
    one = f"{NS}<a>5{NS}</a>"
    assert call_of(one, {"properties": {"a": {"type": None, "enum": None}}}) == {"a": "5"}
    circle = {"$defs": {"J": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/J"}]}}}
    assert call_of(one, {**circle, "properties": {"a": {"$ref": "#/$defs/J"}}}) == {"a": 5}


def test_all_of_several_schemas_hold():
    place = {"type": "object", "properties": {"lat": {"type": "number"}, "name": {"type": ["string", "null"]}}}
    schema = {
        "$defs": {"place": place},
        "allOf": [
            {"properties": {"count": {"type": ["integer", "string"]}}},
            {"properties": {"flag": {"type": "boolean"}}},
        ],
        "properties": {
            "count": {"type": "number"},
            "where": {"allOf": [{"$ref": "#/$defs/place"}, {"properties": {"name": {"type": "string"}}}]},
            "many": {"type": "array", "items": {"allOf": [{"type": "integer"}]}},
            "both": {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, "2"]}]},
            "any": {"allOf": [{"anyOf": [{"type": "integer"}, {"type": "string"}]}, {"minimum": 1}]},
            "circle": {"allOf": [{"$ref": "#/properties/circle"}]},
        },
    }  # fmt: skip
    text = "".join(
        f"{NS}<{name}>{value}{NS}</{name}>"
        for name, value in {"count": 3, "flag": "true", "both": 2, "any": 7, "circle": 1}.items()
    )
    text += f"{NS}<where>{NS}<lat>1.5{NS}</lat>{NS}<name>null{NS}</name>{NS}</where>"
    text += f"{NS}<many>{NS}<item>4{NS}</item>{NS}<item>5{NS}</item>{NS}</many>"
    assert call_of(text, schema) == {
        "count": 3, "flag": True, "both": 2, "any": 7, "circle": "1", "where": {"lat": 1.5, "name": "null"},
        "many": [4, 5],
    }  # fmt: skip


def test_numbers_that_json_cannot_write_stay_text():
    number = {"properties": {"a": {"type": "number"}}}
    for text in ("NaN", "Infinity", "1e999"):
        assert call_of(f"{NS}<a>{text}{NS}</a>", number) == {"a": text}
    assert call_of(f"{NS}<a>1e9{NS}</a>", number) == {"a": 1e9}
