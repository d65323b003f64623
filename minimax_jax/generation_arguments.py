"""Options of `generate` under transformers' names: what is served, what must stay at rest, and what they add up to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from minimax_jax.engine.generation_config import NOT_SERVED, GenerationConfig
from minimax_jax.integers import integer_within

_FIELDS = tuple(field.name for field in dataclasses.fields(GenerationConfig) if field.name != "extra")
# More options of transformers that change what generate does -> the values at which they do nothing here.
_AT_REST: dict[str, tuple[Any, ...]] = {
    **NOT_SERVED,
    "use_cache": (None, True),
    "cache_implementation": (None,),
    "past_key_values": (None,),
    "inputs_embeds": (None,),
    "return_dict_in_generate": (None, False),
    "output_scores": (None, False),
    "output_logits": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "logits_processor": (None, []),
    "stopping_criteria": (None, []),
    "prefix_allowed_tokens_fn": (None,),
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "negative_prompt_ids": (None,),
    "guidance_scale": (None, 1.0),
    "sequence_bias": (None, {}),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None, []),
    "exponential_decay_length_penalty": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "num_beam_groups": (None, 1),
    "max_time": (None,),
    "token_healing": (None, False),
    "watermarking_config": (None,),
    "renormalize_logits": (None, False),
    "remove_invalid_values": (None, False),
}
del _AT_REST["max_length"]  # served as an argument; a file's default says nothing of what its owner wants


def generation_options(
    defaults: GenerationConfig, generation_config: Any, given: Mapping[str, Any], prompt_length: int
) -> tuple[GenerationConfig, bool]:
    """The options of one call: the call's own, else those of its `generation_config`, else the model's.

    Args:
      generation_config: ours, transformers', a mapping, or None.
      given: the call's own options; None for "not given".
      prompt_length: columns of the prompts, padding included, for `max_length`.

    Returns:
      The options, and whether a length was asked for (or is only a default).

    Raises:
      ValueError: for an option that is known and not served at this value, or out of range.
      TypeError: for one that is not known, as Python raises it.
    """
    for name in given:
        if name not in _FIELDS and name not in _AT_REST and name != "max_length":
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
    config = _as_mapping(generation_config)
    for source in (config, given):
        for name, values in _AT_REST.items():
            value = source.get(name)
            if not any(value is allowed or value == allowed for allowed in values):
                allowed = " or ".join(repr(v) for v in values if v is not None) or "None"
                raise ValueError(f"{name} = {value!r}: must be {allowed} (generate serves no other)")
    options = defaults
    length = None
    for source in (config, given):
        options = options.override(**{name: source.get(name) for name in _FIELDS})
        length = _new_tokens(source, prompt_length) or length
    return (options if length is None else options.override(max_new_tokens=length)), length is not None


def _new_tokens(source: Mapping[str, Any], prompt_length: int) -> int | None:
    """What `max_new_tokens` or `max_length` asks for."""
    most, length = source.get("max_new_tokens"), source.get("max_length")
    if length is None:
        return most
    if most is not None:
        raise ValueError("max_length and max_new_tokens: give one of them")
    if (number := integer_within(length, prompt_length + 1)) is None:
        raise ValueError(f"max_length = {length!r}: must be an integer above the prompts' length, {prompt_length}")
    return number - prompt_length


def _as_mapping(generation_config: Any) -> Mapping[str, Any]:
    if generation_config is None:
        return {}
    if isinstance(generation_config, Mapping):
        return generation_config
    if isinstance(generation_config, GenerationConfig):
        fields = {name: getattr(generation_config, name) for name in _FIELDS}
        return {**fields, "eos_token_id": fields["eos_token_id"] or -1}
    if hasattr(generation_config, "to_dict"):
        return generation_config.to_dict()
    raise ValueError(
        f"generation_config is {type(generation_config).__name__}: must be a GenerationConfig or a mapping"
    )
