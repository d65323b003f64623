"""Chat: M3's prompt structure, agreement with transformers' renderer, the sandbox, and parting reasoning from text."""

import copy
import functools
import json
import re
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

import minimax_jax.chat
from minimax_jax.chat import ChatTemplate, ThinkingParser, split_thinking, validate_messages
from minimax_jax.tokenizer import Tokenizer

SOURCE = (Path(minimax_jax.chat.__file__).parent / "tiny_m3" / "chat_template.jinja").read_text(encoding="utf-8")
NS = "]<]minimax[>["
MODES = [None, "adaptive", "enabled", "disabled"]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "search", "description": "<find> größe & more", "parameters": {}},
    },
    {"name": "bare", "parameters": {"type": "object"}},
]
ARGUMENTS = {
    "query": "a <b> & 'c'\n日本",
    "limit": 3,
    "ratio": 0.5,
    "exact": True,
    "nothing": None,
    "items": ["x", [1, False], {"k": None, "v": {}}],
    "nested": {"deep": {"er": "y"}, "gone": None},
}
CALL = {"id": "1", "type": "function", "function": {"name": "search", "arguments": ARGUMENTS}}
USER = {"role": "user", "content": "hi"}
CONVERSATIONS = {
    "user": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "developer": [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, USER],
    "root": [{"role": "root", "content": "Root."}, {"role": "system", "content": "Sys."}, USER],
    "system later": [USER, {"role": "system", "content": "Now be long."}, USER],
    "parts": [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "see"},
                {"type": "video", "video": "v.mp4"},
            ],
        }
    ],
    "reasoning": [USER, {"role": "assistant", "content": "yo", "reasoning_content": "hm\n"}, USER],
    "raw reasoning": [USER, {"role": "assistant", "content": " <mm:think>hm</mm:think>\nyo"}, USER],
    "calls": [
        USER,
        {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "one", "tool_call_id": "1"},
        {"role": "tool", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "Then.", "tool_calls": [{"name": "bare", "arguments": {}}]},
        {"role": "tool", "content": "three"},
    ],
}


@functools.cache
def compiled(source):
    return ChatTemplate(source)


def render(messages, source=SOURCE, **kwargs):
    return compiled(source).render(messages, **kwargs)


def turns(messages, **kwargs):
    """What is rendered after the developer block."""
    return render(messages, **kwargs).split("[e~[\n", 2)[2]


def test_blocks_and_their_order():
    messages = [
        {"role": "root", "content": "Root."},
        {"role": "developer", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "yo"},
    ]
    text = render(messages, add_generation_prompt=False)
    head, *rest = text.split("[e~[\n")
    assert head.startswith("]~!b[]~b]system\nRoot.\n\n<thinking_instructions>\n")
    assert head.endswith("\n</thinking_instructions>")
    assert rest == ["]~b]developer\nBe brief.", "]~b]user\nhi", "]~b]ai\n</mm:think>yo", ""]


def test_defaults_fill_the_first_two_blocks():
    system, developer, user, end = render([USER], add_generation_prompt=False).split("[e~[\n")
    assert system.startswith("]~!b[]~b]system\nYou are tiny M3")
    assert developer == "]~b]developer\nYou are a helpful assistant."
    assert (user, end) == ("]~b]user\nhi", "")


@pytest.mark.parametrize(
    ("mode", "end"), [(None, ""), ("adaptive", ""), ("enabled", "<mm:think>"), ("disabled", "</mm:think>")]
)
def test_thinking_mode_ends_the_prompt(mode, end):
    text = render([USER], thinking_mode=mode)
    assert text.endswith("[e~[\n]~b]ai\n" + end)
    assert render([USER], thinking_mode=mode, add_generation_prompt=False).endswith("]~b]user\nhi[e~[\n")


def test_each_mode_has_its_own_instructions():
    instructions = {mode: render([USER], thinking_mode=mode).split("[e~[")[0] for mode in MODES}
    assert instructions[None] == instructions["adaptive"]
    assert len(set(instructions.values())) == 3
    assert all("<mm:think>" in text for text in instructions.values())


def test_tools_stand_in_the_developer_block():
    developer = render([USER], tools=TOOLS).split("[e~[\n")[1]
    listed = developer.split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
    expected = [json.dumps(tool, ensure_ascii=False) for tool in (TOOLS[0]["function"], TOOLS[1])]
    assert listed == [f"<tool>{tool}</tool>" for tool in expected]
    assert "\n\n# Tools\n" in developer
    assert f'{NS}<tool_call>\n{NS}<invoke name="tool">' in developer.split("</tools>")[1]
    assert "# Tools" not in render([USER], tools=[]) + render([USER])


def test_tool_calls_follow_the_grammar_and_results_are_grouped():
    nested = f"{NS}<deep>{NS}<er>y{NS}</er>{NS}</deep>"
    listed = [
        "x",
        f"{NS}<item>1{NS}</item>{NS}<item>false{NS}</item>",
        f"{NS}<v>{NS}</v>",
    ]
    items = "".join(f"{NS}<item>{item}{NS}</item>" for item in listed)
    fields = {
        "query": ARGUMENTS["query"],
        "limit": "3",
        "ratio": "0.5",
        "exact": "true",
        "items": items,
        "nested": nested,
    }
    invoke = "".join(f"{NS}<{name}>{value}{NS}</{name}>" for name, value in fields.items())
    invoke = f'{NS}<invoke name="search">{invoke}{NS}</invoke>\n'
    expected = (
        "]~b]user\nhi[e~[\n"
        f"]~b]ai\n<mm:think>r</mm:think>{NS}<tool_call>\n{invoke}{invoke}{NS}</tool_call>[e~[\n"
        "]~b]tool\n<response>one</response>\n<response>two</response>[e~[\n"
        f']~b]ai\n</mm:think>Then.{NS}<tool_call>\n{NS}<invoke name="bare">{NS}</invoke>\n{NS}</tool_call>[e~[\n'
        "]~b]tool\n<response>three</response>[e~[\n"
    )
    assert turns(CONVERSATIONS["calls"], add_generation_prompt=False) == expected


def test_arguments_may_be_json_text():
    as_text = copy.deepcopy(CONVERSATIONS["calls"])
    as_text[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(ARGUMENTS)
    as_text[4]["tool_calls"][0]["arguments"] = ""
    before = copy.deepcopy(as_text)
    assert render(as_text) == render(CONVERSATIONS["calls"])
    assert as_text == before


def test_media_parts_are_one_placeholder_each():
    assert turns(CONVERSATIONS["parts"]).startswith("]~b]user\n]<]image[>[see]<]video[>[[e~[\n")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "A"}, "</mm:think>A"),
        ({"content": "A", "reasoning_content": "R"}, "<mm:think>R</mm:think>A"),
        ({"content": "A", "reasoning": "R"}, "<mm:think>R</mm:think>A"),
        ({"content": "A", "reasoning_content": ""}, "</mm:think>A"),
        ({"content": "A", "reasoning_content": None}, "</mm:think>A"),
        ({"content": "<mm:think>R</mm:think>\nA"}, "<mm:think>R</mm:think>\nA"),
        ({"content": "R</mm:think>A</mm:think>B"}, "<mm:think>R</mm:think>A</mm:think>B"),
        ({"content": "</mm:think>A"}, "</mm:think>A"),
        ({"content": "say </mm:think>", "reasoning_content": ""}, "</mm:think>say </mm:think>"),
        ({"reasoning_content": "R"}, "<mm:think>R</mm:think>"),
    ],
)
def test_past_reasoning_is_kept(message, expected):
    messages = [USER, {"role": "assistant", **message}, USER]
    assert f"]~b]ai\n{expected}[e~[\n]~b]user\n" in turns(messages)


def test_later_developer_messages_keep_their_place():
    assert turns(CONVERSATIONS["system later"], add_generation_prompt=False) == (
        "]~b]user\nhi[e~[\n]~b]developer\nNow be long.[e~[\n]~b]user\nhi[e~[\n"
    )


@pytest.mark.parametrize("mode", MODES)
@given(reasoning=st.text("ab<\n", min_size=1), answer=st.text("ab<\n"))
def test_a_parsed_turn_renders_back_to_its_tokens(mode, reasoning, answer):
    generated = {"enabled": f"{reasoning}</mm:think>{answer}", "disabled": answer}
    output = generated.get(mode, f"<mm:think>{reasoning}</mm:think>{answer}")
    thought, content = split_thinking(output, mode)
    message = {"role": "assistant", "content": content, "reasoning_content": thought}
    assert render([USER, message], thinking_mode=mode).startswith(
        render([USER], thinking_mode=mode) + output + "[e~[\n"
    )


# -- the same template through transformers ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our tokenizer and transformers', from one byte-level tokenizer without merges."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("pair")
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["]~!b[", "]~b]", "[e~[", "]<]image[>[", "]<]video[>["])
    bpe.add_tokens([NS, "<tool_call>", "</tool_call>", "<mm:think>", "</mm:think>"])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(SOURCE, encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=SOURCE)
    return Tokenizer.from_pretrained(folder), theirs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_transformers_renders_the_same(pair, name, tools, mode):
    ours, theirs = pair
    messages = CONVERSATIONS[name]
    extra = {} if mode is None else {"thinking_mode": mode}
    for prompt in (True, False):
        text = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **extra)
        kwargs = {"tools": tools, "thinking_mode": mode, "add_generation_prompt": prompt}
        assert ours.apply_chat_template(messages, tokenize=False, **kwargs) == text
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.apply_chat_template(messages, **kwargs) == ids


def test_transformers_gives_templates_the_same_environment(pair):
    source = """
    {% for m in messages %}
        {% if m.role == 'tool' %}{% continue %}{% endif %}
        {% generation %}{{ m | tojson }}|{{ {'é': '<&>'} | tojson(indent=2) }}{% endgeneration %}
    {% endfor %}
{{ strftime_now('%%') }} {{ x is defined }} {{ y }}
"""
    messages = [{"role": "user", "content": "é<'>"}, {"role": "tool", "content": "no"}]
    text = pair[1].apply_chat_template(messages, chat_template=source, tokenize=False, y=[1, 2.5])
    assert render(messages, source, add_generation_prompt=False, y=[1, 2.5]) == text


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ image.save('x') }}",
        "{% for i in range(999999) %}{% endfor %}",
    ],
)
def test_the_sandbox_refuses_malicious_templates(source):
    class Image:
        def save(self, path):
            raise AssertionError("a template called a method of a caller's object")

    with pytest.raises(ValueError, match=r"^chat template: "):
        render([USER], source, image=Image())


def test_a_broken_template_names_the_line():
    with pytest.raises(ValueError, match="chat template, line 2: "):
        ChatTemplate("fine\n{% if %}")


@pytest.mark.parametrize("source", ["{{ raise_exception('only users') }}", "{{ 1 + 'only users' }}"])
def test_a_failing_template_is_a_value_error(source):
    with pytest.raises(ValueError, match=r"^chat template: (only users|unsupported operand)"):
        render([USER], source)


def assistant(**kwargs):
    return {"role": "assistant", "content": "", **kwargs}


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("hi", "messages: must be a list of dicts, got str"),
        ([], "messages: must hold at least one message"),
        ([USER, "hi"], "messages[1]: must be a dict, got str"),
        (
            [USER, {"content": "x"}],
            "messages[1].role: must be one of root, system, developer, user, assistant, tool",
        ),
        ([{"role": "ai", "content": "x"}], "messages[0].role: must be one of root, system"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role: must be one of root, system"),
        ([{"role": "user"}], "messages[0].content: missing; must be a string or a list of parts"),
        ([{"role": "assistant", "content": None}], "messages[0].content: missing"),
        (
            [{"role": "user", "content": 3}],
            "messages[0].content: must be a string or a list of parts, got int",
        ),
        (
            [{"role": "user", "content": ["x"]}],
            "messages[0].content[0].type: must be one of text, image, video",
        ),
        (
            [USER, {"role": "user", "content": [{"type": "image"}, {"type": "image_url"}]}],
            "messages[1].content[1].type: must be one of text, image, video, got 'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text: must be str"),
        ([assistant(reasoning=1)], "messages[0].reasoning: must be str, got int"),
        (
            [{**USER, "tool_calls": [CALL]}],
            "messages[0].tool_calls: only allowed for role assistant, not user",
        ),
        ([assistant(tool_calls={})], "messages[0].tool_calls: must be a list, got dict"),
        ([assistant(tool_calls=[CALL, {}])], "messages[0].tool_calls[1]: must be a dict with function.name"),
        (
            [assistant(tool_calls=[{"name": "f", "arguments": "{"}])],
            "messages[0].tool_calls[0].arguments: must be",
        ),
        (
            [assistant(tool_calls=[{"name": "f", "arguments": [1]}])],
            "messages[0].tool_calls[0].arguments: must be",
        ),
        ([USER, {"role": "root", "content": "x"}], "chat template: a root message must come first"),
    ],
)
def test_bad_messages_name_the_place_and_what_is_allowed(messages, error):
    with pytest.raises(ValueError, match="^" + re.escape(error)):
        render(messages)


@pytest.mark.parametrize("tools", ["f", [1], [{"function": {}}], [{"type": "function"}]])
def test_bad_tools_are_refused(tools):
    with pytest.raises(ValueError, match=r"^tools(\[0\])?: must be a "):
        render([USER], tools=tools)


@pytest.mark.parametrize(
    "use", [lambda m: render([USER], thinking_mode=m), ThinkingParser, lambda m: split_thinking("", m)]
)
def test_a_wrong_thinking_mode_is_refused(use):
    with pytest.raises(
        ValueError, match="thinking_mode: must be one of None, 'enabled', 'disabled', 'adaptive', got 'on'"
    ):
        use("on")


def test_validated_messages_are_plain_copies():
    class Sly(str):
        def __str__(self):
            return "other"

    part = {"type": "image", "image": object()}
    message = {"role": "user", "content": [part, {"type": "text", "text": Sly("own")}], "name": None}
    (plain,) = validate_messages((message,))
    assert plain == {
        "role": "user",
        "content": [{"type": "image", "image": "<object>"}, {"type": "text", "text": "own"}],
    }
    assert type(plain["content"][1]["text"]) is str
    assert "name" in message


# -- reasoning in the output ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "text", "expected"),
    [
        ("enabled", "R</mm:think>\nA", ("R", "\nA")),
        ("enabled", "R cut off", ("R cut off", "")),
        ("enabled", "</mm:think>A", ("", "A")),
        ("enabled", "<mm:think>R</mm:think>A", ("R", "A")),
        ("enabled", "R</mm:thi", ("R</mm:thi", "")),
        ("enabled", "R</mm:think>A</mm:think>B<mm:think>", ("R", "A</mm:think>B<mm:think>")),
        ("disabled", "A", ("", "A")),
        ("disabled", "</mm:think>A", ("", "A")),
        (
            "disabled",
            "<mm:think> opens it, </mm:think> closes it",
            ("", "<mm:think> opens it, </mm:think> closes it"),
        ),
        ("adaptive", "<mm:think>R</mm:think>A", ("R", "A")),
        ("adaptive", "</mm:think>A", ("", "A")),
        ("adaptive", "\n</mm:think>\nA", ("", "\nA")),
        ("adaptive", "A <mm:think>b</mm:think>", ("", "A <mm:think>b</mm:think>")),
        ("adaptive", "<mm:think>R", ("R", "")),
        ("adaptive", " \n A", ("", " \n A")),
        ("adaptive", "</mm", ("", "</mm")),
        ("adaptive", "", ("", "")),
        (None, "<mm:think>R</mm:think>A", ("R", "A")),
        (None, "</mm:think>A", ("", "A")),
    ],
)
def test_split_thinking(mode, text, expected):
    assert split_thinking(text, mode) == expected
    parser = ThinkingParser(mode)
    pieces = [parser.push(char) for char in text] + [parser.finish()]
    assert tuple(map("".join, zip(*pieces, strict=True))) == expected


MARKED = st.lists(
    st.sampled_from(["<mm:think>", "</mm:think>", "<", "</", "</mm:", "mm:think>", "<mm", " ", "\n", "a", "é🙂"]),
    max_size=8,
).map("".join)


@given(data=st.data(), text=MARKED, mode=st.sampled_from(MODES))
@settings(max_examples=500, deadline=None)
def test_streaming_equals_the_whole_for_any_cut(data, text, mode):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    parser = ThinkingParser(mode)
    whole = split_thinking(text, mode)
    seen = ["", ""]
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        for side, piece in enumerate(parser.push(text[start:end])):
            seen[side] += piece
            assert whole[side].startswith(seen[side])
    for side, piece in enumerate(parser.finish()):
        seen[side] += piece
    assert tuple(seen) == whole


def test_text_that_is_certain_is_not_held_back():
    parser = ThinkingParser("enabled")
    assert parser.in_reasoning
    assert parser.push("thinking") == ("thinking", "")
    assert parser.push(" a < b </mm:") == (" a < b ", "")
    assert parser.push("think>So") == ("", "So")
    assert not parser.in_reasoning
    assert parser.push(" a <") == ("", " a <")
    assert parser.finish() == ("", "")
