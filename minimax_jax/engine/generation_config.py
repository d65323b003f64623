"""How to generate when the caller does not say: `generation_config.json`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Defaults of `generate`, with transformers' names.

    Attributes:
      max_new_tokens: None for as many as the context allows, at most 256.
      do_sample: whether to sample; greedy otherwise.
      temperature, top_p, top_k: of sampling; top_p 1.0 and top_k 0 switch these off.
      eos_token_id: ids that end a sequence.
      pad_token_id: what fills a row after its end; None for the first end-of-text id, or 0.

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

    def __post_init__(self) -> None:
        def require(holds: bool, key: str, allowed: str) -> None:
            if not holds:
                raise ValueError(f"{key} = {getattr(self, key)!r}: must be {allowed}")

        require(self.max_new_tokens is None or _is_int(self.max_new_tokens, 1), "max_new_tokens", "an integer >= 1")
        require(isinstance(self.do_sample, bool), "do_sample", "true or false")
        require(_is_number(self.temperature) and self.temperature >= 0, "temperature", "a number >= 0 (0 is greedy)")
        require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", "a number in (0, 1]")
        require(_is_int(self.top_k, 0), "top_k", "an integer >= 0 (0 switches it off)")
        require(all(_is_int(i, 0) for i in self.eos_token_id), "eos_token_id", "token ids >= 0")
        require(self.pad_token_id is None or _is_int(self.pad_token_id, 0), "pad_token_id", "a token id >= 0")

    @property
    def greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return not self.do_sample or self.temperature == 0

    def override(self, **options: Any) -> GenerationConfig:
        """A copy in which every option that is not None replaces the default.

        An `eos_token_id` may be one id or several.
        """
        given = {key: value for key, value in options.items() if value is not None}
        if "eos_token_id" in given:
            given["eos_token_id"] = _ids(given["eos_token_id"])
        return dataclasses.replace(self, **given)

    @classmethod
    def from_pretrained(cls, directory: Path, eos_token_ids: tuple[int, ...] = ()) -> GenerationConfig:
        """Reads `directory/generation_config.json`; `eos_token_ids` stand in where it names none.

        Raises:
          ValueError: if the file is not a JSON object or holds impossible values.
        """
        path = directory / "generation_config.json"
        values: dict[str, Any] = {}
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: not valid JSON ({error})") from None
            if not isinstance(values, dict):
                raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            defaults = cls(eos_token_id=eos_token_ids)
            return defaults.override(**{key: value for key, value in values.items() if key in known})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def write(self, directory: Path) -> None:
        """Writes `directory/generation_config.json`."""
        path = directory / "generation_config.json"
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The content of a generation_config.json, unset values left out."""
        values = dataclasses.asdict(self)
        values["eos_token_id"] = list(self.eos_token_id)
        return {key: value for key, value in values.items() if value not in (None, [])}


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
