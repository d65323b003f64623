"""How to generate when the caller does not say: `generation_config.json`."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minimax_jax.integers import integer_within
from minimax_jax.paths import model_directory

# Below this a division by the temperature is no float32 any more: the distribution is all on the likeliest token.
COLDEST = 1e-30
# Options of transformers that would change the tokens and are not served here -> the values that do nothing.
NOT_SERVED = {
    "repetition_penalty": (None, 1.0),
    "min_p": (None, 0.0),
    "typical_p": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "min_new_tokens": (None, 0),
    "min_length": (None, 0),
    "max_length": (None, 20),
    "penalty_alpha": (None, 0.0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "stop_strings": (None, []),
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Defaults of `generate`, with transformers' names.

    Attributes:
      max_new_tokens: None for as many as the context allows, at most 256.
      do_sample: whether to sample; greedy otherwise.
      temperature, top_p, top_k: of sampling; top_p 1.0 and top_k 0 switch these off.
      eos_token_id: ids that end a sequence.
      pad_token_id: what fills a row after its end; None for the first end-of-text id, or 0.
      extra: other keys of the file, kept for `write`.

    Raises:
      ValueError: for values out of range; the message names the key and what is allowed.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        def require(holds: bool, key: str, allowed: str) -> None:
            if not holds:
                raise ValueError(f"{key} = {getattr(self, key)!r}: must be {allowed}")

        require(self.max_new_tokens is None or _is_int(self.max_new_tokens, 1), "max_new_tokens", "an integer >= 1")
        require(isinstance(self.do_sample, bool), "do_sample", "true or false")
        require(_is_number(self.temperature) and self.temperature >= 0, "temperature", "a number >= 0 (0 is greedy)")
        require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number in (0, 1]")
        require(_is_int(self.top_k, 0), "top_k", "an integer within 0..2147483647 (0 switches it off)")
        require(all(_is_int(i, 0) for i in self.eos_token_id), "eos_token_id", "token ids >= 0")
        require(self.pad_token_id is None or _is_int(self.pad_token_id, 0), "pad_token_id", "a token id >= 0")

    @property
    def greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return not self.do_sample or self.temperature < COLDEST

    @property
    def pad(self) -> int:
        """What fills a row after its end."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_id[0] if self.eos_token_id else 0

    def override(self, **options: Any) -> GenerationConfig:
        """A copy in which every option that is not None replaces the default.

        Numbers may be NumPy scalars; `eos_token_id` may be one id or several in any container, or -1 for none.
        """
        given = {key: _plain(value) for key, value in options.items() if value is not None}
        if "eos_token_id" in given:
            ids = given["eos_token_id"]
            ids = tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
            given["eos_token_id"] = () if ids == (-1,) else ids
        return dataclasses.replace(self, **given)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if an end-of-text or pad id is no token."""
        for key, ids in (("eos_token_id", self.eos_token_id), ("pad_token_id", (self.pad_token_id or 0,))):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise ValueError(f"{key} = {token_id}: must be within 0..{vocab_size - 1}")

    @classmethod
    def from_pretrained(cls, directory: str | Path, eos_token_ids: tuple[int, ...] = ()) -> GenerationConfig:
        """Reads `directory/generation_config.json`; `eos_token_ids` stand in where it names none.

        Warns of options in it that change tokens and are not served.

        Raises:
          FileNotFoundError: if there is no such directory.
          ValueError: if the file is not a JSON object or holds impossible values.
        """
        path = model_directory(directory) / "generation_config.json"
        values: dict[str, Any] = {}
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: not valid JSON ({error})") from None
            if not isinstance(values, dict):
                raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
        known = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        ignored = [key for key, neutral in NOT_SERVED.items() if values.get(key) not in neutral]
        if ignored:
            warnings.warn(f"{path}: {', '.join(ignored)} will be ignored (not served by generate)", stacklevel=2)
        try:
            defaults = cls(eos_token_id=eos_token_ids, extra={k: v for k, v in values.items() if k not in known})
            return defaults.override(**{key: value for key, value in values.items() if key in known})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def write(self, directory: Path) -> None:
        """Writes `directory/generation_config.json`."""
        path = directory / "generation_config.json"
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The content of a generation_config.json; what only repeats a default is left out."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "extra" and getattr(self, field.name) != field.default
        }
        if self.eos_token_id:
            values["eos_token_id"] = list(self.eos_token_id)
        return {**self.extra, **values}


def _plain(value: Any) -> Any:
    """NumPy, JAX and torch scalars and arrays as Python numbers and lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_int(value: Any, least: int) -> bool:
    return integer_within(value, least, 2**31 - 1) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
