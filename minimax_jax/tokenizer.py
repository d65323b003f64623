"""Text to token ids and back: `tokenizer.json` read directly, and streaming detokenisation.

MiniMax-M3 uses byte-level BPE: base ids 0-199999, added tokens 200000-200060 (`]~b]` 200019, `[e~[` 200020 = end
of turn, `]~!b[` 200034 = start of document, `]<]minimax[>[` 200058, `<mm:think>` 200059, `</mm:think>` 200060).
The tool and thinking markers are added but not special, so they survive `skip_special_tokens`. The file is loaded
by `tokenizers` itself because wrappers that rebuild the pre-tokeniser have shifted tokens of earlier models.
"""

from __future__ import annotations

import codecs
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from minimax_jax.chat import ChatTemplate
from minimax_jax.paths import model_directory

END_OF_TURN = "[e~["
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A byte-level BPE tokenizer with the chat template of its checkpoint.

    Build it with `Tokenizer.from_pretrained(directory)`.

    Attributes:
        eos_token_ids: ids that end a generation, possibly empty. From `generation_config.json`, else `config.json`
            (top level, then `text_config`), else `tokenizer_config.json`'s `eos_token`, else `[e~[` if it exists.
        bos_token_id: id of `tokenizer_config.json`'s `bos_token`, or None. Never added by `encode`: M3's chat
            template writes it, and `generation_config.json` names a different token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int] = (),
        bos_token_id: int | None = None,
        chat_template: str | None = None,
        template_tokens: Mapping[str, str] | None = None,
        source: str = "tokenizer.json",
    ):
        """Wrap a loaded `tokenizers.Tokenizer`; its truncation and padding settings are switched off.

        Args:
            backend: the tokenizer. Its decoder must be `ByteLevel`.
            eos_token_ids, bos_token_id: see the class.
            chat_template: jinja source, or None for a tokenizer without chat.
            template_tokens: names such as `bos_token` that the template may read, with their text.
            source: what errors call the tokenizer, usually its path.

        Raises:
            ValueError: the decoder is not byte-level, so `TextStream` could not reproduce it.
        """
        decoder = type(backend.decoder).__name__
        if decoder != "ByteLevel":
            raise ValueError(f"{source}: the decoder must be ByteLevel, got {decoder}")
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._source = source
        self._byte_of = _byte_of_char()
        self._bytes_of: dict[int, bytes] = {}  # of tokens that were met
        self._special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self._chat_source = chat_template
        self._chat: ChatTemplate | None = None
        self._template_tokens = dict(template_tokens or {})
        self.eos_token_ids: tuple[int, ...] = tuple(eos_token_ids)
        self.bos_token_id = bos_token_id

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Tokenizer:
        """Load the tokenizer of a local checkpoint folder; "tiny" is the embedded one.

        Reads `tokenizer.json` (required); `generation_config.json`, `config.json` and `tokenizer_config.json` for the
        eos and bos ids; and the chat template from `chat_template.jinja`, else `tokenizer_config.json`.

        Raises:
            FileNotFoundError: the folder or its `tokenizer.json` does not exist.
            ValueError: a file is there but cannot be read as what it should be; the message names it.
        """
        directory = model_directory(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {directory}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - tokenizers raises nothing more specific
            raise ValueError(f"{path} is not a tokenizer.json that can be read: {_one_line(error)}") from None

        settings = _read_json(directory / "tokenizer_config.json")
        texts = {name: _token_text(settings.get(name)) for name in _TEMPLATE_TOKENS}
        tokens = {name: text for name, text in texts.items() if text is not None}
        eos = _configured_eos(directory)
        if not eos:
            named = backend.token_to_id(tokens.get("eos_token", END_OF_TURN))
            eos = () if named is None else (named,)
        return cls(
            backend,
            eos_token_ids=eos,
            bos_token_id=backend.token_to_id(tokens["bos_token"]) if "bos_token" in tokens else None,
            chat_template=_read_chat_template(directory, settings),
            template_tokens=tokens,
            source=str(path),
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model may have more rows (M3: 200064 for 200061 tokens)."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_id(self) -> int | None:
        """The first of `eos_token_ids`, or None when the checkpoint names none."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return self._chat_source is not None

    def token_to_id(self, token: str) -> int | None:
        """The id of one token, written as in the vocabulary; None if there is no such token."""
        return self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Nothing is added; special tokens written in the text become their ids.

        Raises:
            TypeError: `text` is not a str.
            ValueError: `text` holds a lone surrogate, which no UTF-8 text can.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: must be str, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text: lone surrogate at position {error.start}, not valid Unicode") from None
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids without a token (padded rows) add nothing.

        Raises:
            TypeError: an id is not an integer.
            ValueError: an id is negative or above 32 bits.
        """
        return self._backend.decode([_token_id(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """The UTF-8 bytes one token adds to the text, possibly part of a character; errors as in `decode`."""
        token_id = _token_id(token_id)
        if skip_special_tokens and token_id in self._special_ids:
            return b""
        known = self._bytes_of.get(token_id)
        if known is None:
            self._bytes_of[token_id] = known = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes([self._byte_of[char] for char in token])
        except KeyError:  # an added token, written as plain text rather than in the byte alphabet
            return token.encode("utf-8")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking_mode: str | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> list[int] | str:
        """Render a conversation with the checkpoint's template: ids, or text with `tokenize=False`.

        Arguments and errors are those of `ChatTemplate.render`; the end of the prompt that `thinking_mode` chooses
        decides where the answer starts, so give `split_thinking` the same mode.

        Raises:
            ValueError: no template, a template that fails, or invalid arguments.
        """
        if self._chat is None:
            if self._chat_source is None:
                raise ValueError(f"{self._source}: no chat_template.jinja or chat_template setting beside it")
            self._chat = ChatTemplate(self._chat_source)
        text = self._chat.render(
            messages,
            tools=tools,
            thinking_mode=thinking_mode,
            add_generation_prompt=add_generation_prompt,
            **{**self._template_tokens, **kwargs},
        )
        return self.encode(text) if tokenize else text


class TextStream:
    """Text of a growing list of token ids, as it becomes certain.

    The pieces returned by `push` and `finish`, joined, equal `Tokenizer.decode` of all ids. A character whose bytes
    are still incomplete is held back; the work per token does not depend on how many came before.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # CPython replaces maximal ill-formed subsequences, as Rust's lossy conversion in `decode` does.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Take one id and return the text it completed, often empty. Errors are those of `decode`."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, self._skip_special_tokens))

    def extend(self, token_ids: Iterable[int]) -> str:
        """Take several ids and return the text they completed, that of pushing one after the other."""
        return self._utf8.decode(b"".join(self._tokenizer.token_bytes(i, self._skip_special_tokens) for i in token_ids))

    def finish(self) -> str:
        """Return what is held back (U+FFFD for an incomplete character); the stream can then be used afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: visible Latin-1 characters are themselves, the rest are U+0100 and on, in order."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in visible}
    hidden = (byte for byte in range(256) if byte not in visible)
    table.update({chr(256 + n): byte for n, byte in enumerate(hidden)})
    return table


def _token_id(value: Any) -> int:
    try:
        token_id = operator.index(value)
    except TypeError:
        raise TypeError(f"token id: must be an integer, got {type(value).__name__}") from None
    if not 0 <= token_id < 2**32:
        raise ValueError(f"token id: must be in [0, 2**32), got {token_id}")
    return token_id


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} when the file does not exist. ValueError names a file that holds anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {_one_line(error)}") from None
    if type(value) is not dict:
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _token_text(value: Any) -> str | None:
    """Text of a token in tokenizer_config.json, which writes it as a string or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _configured_eos(directory: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        config = _read_json(path)
        text_config = config.get("text_config")
        for section in (config, text_config if isinstance(text_config, dict) else {}):
            value = section.get("eos_token_id")
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, got {value!r}")
            return tuple(ids)
    return ()


def _read_chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {_one_line(error)}") from None
    value = settings.get("chat_template")
    if isinstance(value, list):  # named templates; "default" is the one for conversations
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{directory / 'tokenizer_config.json'}: chat_template must be a string")
    return value
