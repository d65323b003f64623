"""Reads and writes the forms a MiniMax-M3 config.json comes in.

Vendor: a wrapper with `text_config` (or the bare text part) that uses `sparse_attention_config` and
`moe_layer_freq`. transformers: `minimax_m3_vl` / `minimax_m3_vl_text`, flat `index_*` keys, `layer_types`,
`mlp_layer_types` and `rope_parameters`. The two mix freely, as they do in transformers' own loader.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from minimax_jax.config import (
    DENSE_MLP,
    FULL_ATTENTION,
    LARGEST_INT,
    MOE_MLP,
    SPARSE_ATTENTION,
    ConfigError,
    MiniMaxM3Config,
    VisionConfig,
    is_finite,
)

_MODEL_TYPES = ("minimax_m3_vl", "minimax_m3_vl_text")
_REQUIRED = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "dense_intermediate_size intermediate_size num_local_experts num_experts_per_tok"
).split()
_PLAIN = (
    _REQUIRED
    + (
        "rms_norm_eps tie_word_embeddings max_position_embeddings shared_intermediate_size n_shared_experts "
        "routed_scaling_factor swiglu_alpha swiglu_limit swiglu_beta"
    ).split()
)
_MOST_LAYERS = 10_000  # a default list of them is made before any other check
_INDEX_KEYS = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_init_blocks": "sparse_init_block",
    "index_local_blocks": "sparse_local_block",
}
# Variants of the architecture's family that the maths here does not have: key -> the one value it may take.
_FIXED = {
    "scoring_func": ("sigmoid",),
    "use_routing_bias": (True,),
    "hidden_act": ("swigluoai", "silu"),  # transformers writes "silu" for the same swigluoai maths
    "use_gemma_norm": (True,),
    "use_qk_norm": (True,),
    "qk_norm_type": ("per_head",),
    "attention_output_gate": (False,),
    "rope_scaling": (None,),
}
_TEXT_READ = {
    *_PLAIN, *_INDEX_KEYS, *_FIXED,
    "model_type", "architectures", "eos_token_id", "bos_token_id", "sparse_attention_config", "moe_layer_freq",
    "layer_types", "mlp_layer_types", "rope_theta", "rotary_dim", "partial_rotary_factor", "rope_parameters",
}  # fmt: skip
_OBJECTS = ("sparse_attention_config", "rope_parameters", "quantization_config")
_TOP_OBJECTS = ("vision_config", "quantization_config", "img_token_compression_config")
# MiniMax-M3's document start and end of turn, which the vendor's config.json leaves to the tokenizer.
_DEFAULT_BOS, _DEFAULT_EOS = 200034, 200020
_TOP_READ = {
    "text_config", "vision_config", "model_type", "projector_hidden_size", "quantization_config",
    "eos_token_id", "bos_token_id",
}  # fmt: skip


def parse_config(config: Mapping[str, Any]) -> MiniMaxM3Config:
    """See `MiniMaxM3Config.from_dict`."""
    problems: list[str] = []
    wrapped = isinstance(config.get("text_config"), Mapping)
    text = dict(config["text_config"]) if wrapped else dict(config)
    model_type = config.get("model_type")
    if model_type is not None and model_type not in _MODEL_TYPES:
        problems.append(f"model_type = {model_type!r}: must be one of {', '.join(map(repr, _MODEL_TYPES))}")
    for key in _REQUIRED:
        if key not in text:
            problems.append(f"{key} is missing: a MiniMax-M3 config names it")
        elif not isinstance(text[key], int) or isinstance(text[key], bool) or text[key] < 1:
            problems.append(f"{key} = {text[key]!r}: must be an integer >= 1")
        elif text[key] > (most := _MOST_LAYERS if key == "num_hidden_layers" else LARGEST_INT):
            problems.append(f"{key} = {text[key]!r}: must be at most {most}")
    for key in ("eos_token_id", "bos_token_id"):
        if wrapped and text.get(key) is None and config.get(key) is not None:
            text[key] = config[key]
    _check_types(config, text, wrapped, problems)
    for key, allowed in _FIXED.items():
        if key in text and text[key] not in allowed:
            problems.append(f"{key} = {text[key]!r}: must be {' or '.join(map(repr, allowed))}")
    if wrapped and config.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = True  # transformers ties when either level says so
    if problems:
        raise ConfigError("impossible configuration:\n  " + "\n  ".join(problems))

    fields: dict[str, Any] = {key: text[key] for key in _PLAIN if key in text}
    fields.setdefault("shared_intermediate_size", text["intermediate_size"])
    fields["eos_token_id"] = _token_ids(text, "eos_token_id", _DEFAULT_EOS)
    fields["bos_token_id"] = _token_ids(text, "bos_token_id", _DEFAULT_BOS)
    fields.update(_rope(text, problems))
    fields.update(_sparse_attention(text, problems))
    fields["mlp_layer_types"] = _layer_kinds(
        text, "mlp_layer_types", "moe_layer_freq", text, DENSE_MLP, MOE_MLP, problems
    )
    fields["vision"] = _vision(config, problems) if wrapped else None
    fields["quantization"] = config.get("quantization_config") or text.get("quantization_config")
    fields["extra"] = _unknown(config, text, wrapped)
    if problems:
        raise ConfigError("impossible configuration:\n  " + "\n  ".join(problems))
    return MiniMaxM3Config(**fields)


def _check_types(config: Mapping[str, Any], text: Mapping[str, Any], wrapped: bool, problems: list[str]) -> None:
    """Objects, lists and factors whose contents the readers below look into."""
    homes: list[tuple[str, Mapping[str, Any], tuple[str, ...]]] = [("", text, _OBJECTS)]
    if wrapped:
        homes.append(("", config, _TOP_OBJECTS))
        vision = config.get("vision_config")
        if isinstance(vision, Mapping):
            homes.append(("vision_config.", vision, ("img_token_compression_config",)))
    for prefix, home, keys in homes:
        wrong = [key for key in keys if home.get(key) is not None and not isinstance(home[key], Mapping)]
        problems.extend(f"{prefix}{key} = {home[key]!r}: must be an object" for key in wrong)
    lists = ("layer_types", "mlp_layer_types")
    wrong = [key for key in lists if text.get(key) is not None and not isinstance(text[key], (list, tuple))]
    problems.extend(f"{key} = {text[key]!r}: must be a list, one entry per layer" for key in wrong)
    eos = text.get("eos_token_id")
    if eos is not None and not isinstance(eos, (int, list, tuple)):
        problems.append(f"eos_token_id = {eos!r}: must be null, an integer or a list of integers")
    rope = text.get("rope_parameters")
    for prefix, home in (("", text), ("rope_parameters.", rope if isinstance(rope, Mapping) else {})):
        factor = home.get("partial_rotary_factor")
        if factor is not None and not (is_finite(factor) and 0 < factor <= 1):
            problems.append(f"{prefix}partial_rotary_factor = {factor!r}: must be a number in (0, 1]")


def _token_ids(text: Mapping[str, Any], key: str, default: int) -> Any:
    """The configured id or ids, else MiniMax-M3's own where the vocabulary has it."""
    value = text.get(key)
    if isinstance(value, (list, tuple)):
        return tuple(value)
    if value is None or value == default:  # transformers writes the default into smaller vocabularies too
        return default if text["vocab_size"] > default else None
    return value


def _rope(text: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """theta and the rotated width: `rope_parameters` when present, else the vendor's flat keys."""
    parameters = text.get("rope_parameters") or {}
    kind = parameters.get("rope_type", "default")
    if kind != "default":
        problems.append(f"rope_parameters.rope_type = {kind!r}: must be 'default'")
    factor = parameters.get("partial_rotary_factor", text.get("partial_rotary_factor"))
    from_factor = None if factor is None else int(text["head_dim"] * factor)
    rotary_dim = text.get("rotary_dim")
    if parameters or rotary_dim is None:  # transformers never reads rotary_dim: the factor decides, 1.0 if absent
        rotary_dim = text["head_dim"] if from_factor is None else from_factor
    elif from_factor is not None and from_factor != rotary_dim:
        problems.append(
            f"rotary_dim = {rotary_dim!r}: must be head_dim * partial_rotary_factor = {from_factor} when both are given"
        )
    theta = parameters.get("rope_theta", text.get("rope_theta", MiniMaxM3Config.rope_theta))
    return {"rope_theta": theta, "rotary_dim": rotary_dim}


def _sparse_attention(text: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    sparse = text.get("sparse_attention_config") or {}
    score_type = sparse.get("sparse_score_type", "max")
    if score_type != "max":
        problems.append(f"sparse_attention_config.sparse_score_type = {score_type!r}: must be 'max'")
    fields: dict[str, Any] = {}
    for flat, vendor in _INDEX_KEYS.items():
        if vendor in sparse:
            fields[flat] = sparse[vendor]
        elif flat in text:
            fields[flat] = text[flat]
    if sparse.get("use_sparse_attention") and "sparse_attention_freq" not in sparse and not text.get("layer_types"):
        problems.append(
            "sparse_attention_config.sparse_attention_freq is missing: use_sparse_attention is true, "
            "so a list of 0 and 1, one per layer, must say where"
        )
    kinds = _layer_kinds(
        text, "layer_types", "sparse_attention_freq", sparse, FULL_ATTENTION, SPARSE_ATTENTION, problems
    )
    if sparse.get("use_sparse_attention") is False:
        kinds = (FULL_ATTENTION,) * len(kinds)
    index_value_off = sparse.get("sparse_disable_index_value")
    if isinstance(index_value_off, (list, tuple)):
        for layer_id, (kind, off) in enumerate(zip(kinds, index_value_off, strict=False)):
            if kind == SPARSE_ATTENTION and not off:
                problems.append(
                    f"sparse_attention_config.sparse_disable_index_value[{layer_id}] = {off!r}: "
                    "must be 1 on every sparse layer (the index branch has no value path)"
                )
                break
    fields["layer_types"] = kinds
    return fields


def _layer_kinds(
    text: Mapping[str, Any],
    names_key: str,
    freq_key: str,
    freq_home: Mapping[str, Any],
    off: str,
    on: str,
    problems: list[str],
) -> tuple[str, ...]:
    """Per-layer kinds from transformers' list of names or from the vendor's list of 0 and 1."""
    num_layers = text["num_hidden_layers"]
    if text.get(names_key) is not None:
        return tuple(text[names_key])
    freq = freq_home.get(freq_key)
    if freq is None:  # transformers' defaults
        return (FULL_ATTENTION if on == SPARSE_ATTENTION else MOE_MLP,) * num_layers
    if not isinstance(freq, (list, tuple)):
        problems.append(f"{freq_key} = {freq!r}: must be a list of 0 and 1, one per layer")
        return ()
    if len(freq) != num_layers:
        problems.append(f"{freq_key} has {len(freq)} entries: must be num_hidden_layers = {num_layers}")
    for layer_id, flag in enumerate(freq):
        if flag not in (0, 1):
            problems.append(f"{freq_key}[{layer_id}] = {flag!r}: must be 0 or 1")
            break
    return tuple(on if flag else off for flag in freq)


def _vision(config: Mapping[str, Any], problems: list[str]) -> VisionConfig | None:
    raw = config.get("vision_config")
    if not raw:
        return None
    compression = raw.get("img_token_compression_config") or config.get("img_token_compression_config") or {}
    values = {**compression, **raw}
    names = {field.name for field in dataclasses.fields(VisionConfig)} - {"raw", "projector_hidden_size"}
    sizes = {name: values[name] for name in names if name in values}
    projector = config.get("projector_hidden_size", VisionConfig.projector_hidden_size)
    for key, size in (
        *((f"vision_config.{name}", size) for name, size in sizes.items()),
        ("projector_hidden_size", projector),
    ):
        most = _MOST_LAYERS if key.endswith("num_hidden_layers") else LARGEST_INT
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            problems.append(f"{key} = {size!r}: must be an integer from 1 to {most}")
    return VisionConfig(**sizes, projector_hidden_size=projector, raw=dict(raw))


def _unknown(config: Mapping[str, Any], text: Mapping[str, Any], wrapped: bool) -> dict[str, Any]:
    """Keys that decide nothing here, kept as they stood: the text part's, and the wrapper's under "wrapper"."""
    extra = {key: value for key, value in text.items() if key not in _TEXT_READ and key not in _TOP_READ}
    if wrapped:
        top = {key: value for key, value in config.items() if key not in _TOP_READ}
        if top:
            extra["wrapper"] = top
    return extra


def config_to_dict(config: MiniMaxM3Config, style: str) -> dict[str, Any]:
    """See `MiniMaxM3Config.to_dict`."""
    if style == "transformers":
        return _transformers_dict(config)
    if style == "vendor":
        return _vendor_dict(config)
    raise ValueError(f"style = {style!r}: must be 'vendor' or 'transformers'")


def _plain_fields(config: MiniMaxM3Config) -> dict[str, Any]:
    """What both styles write under the same names."""
    fields = {key: getattr(config, key) for key in _PLAIN}
    eos = config.eos_token_id
    fields["eos_token_id"] = list(eos) if isinstance(eos, tuple) else eos
    fields["bos_token_id"] = config.bos_token_id
    return fields


def _partial_rotary_factor(config: MiniMaxM3Config) -> float:
    """The factor that gives `rotary_dim` again when a reader truncates its product with `head_dim`."""
    factor = config.rotary_dim / config.head_dim
    return factor if int(config.head_dim * factor) == config.rotary_dim else math.nextafter(factor, 1.0)


def _transformers_dict(config: MiniMaxM3Config) -> dict[str, Any]:
    result = {key: value for key, value in config.extra.items() if key != "wrapper"}
    result.update(_plain_fields(config))
    result.update({key: getattr(config, key) for key in _INDEX_KEYS})
    result.update(
        architectures=["MiniMaxM3VLForCausalLM"],
        model_type="minimax_m3_vl_text",
        hidden_act="silu",
        layer_types=list(config.layer_types),
        mlp_layer_types=list(config.mlp_layer_types),
        rotary_dim=config.rotary_dim,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": _partial_rotary_factor(config),
        },
    )
    return result


def _vendor_dict(config: MiniMaxM3Config) -> dict[str, Any]:
    sparse = [int(config.is_sparse(i)) for i in range(config.num_hidden_layers)]
    text = {key: value for key, value in config.extra.items() if key != "wrapper"}
    text.update(_plain_fields(config))
    text.update(
        architectures=["MiniMaxM3SparseForCausalLM"],
        scoring_func="sigmoid",
        use_routing_bias=True,
        moe_layer_freq=[int(config.is_moe(i)) for i in range(config.num_hidden_layers)],
        hidden_act="swigluoai",
        use_gemma_norm=True,
        use_qk_norm=True,
        qk_norm_type="per_head",
        attention_output_gate=False,
        rope_theta=config.rope_theta,
        rotary_dim=config.rotary_dim,
        partial_rotary_factor=_partial_rotary_factor(config),
        sparse_attention_config={
            "use_sparse_attention": any(sparse),
            **{vendor: getattr(config, flat) for flat, vendor in _INDEX_KEYS.items()},
            "sparse_score_type": "max",
            "sparse_attention_freq": sparse,
            "sparse_disable_index_value": list(sparse),
        },
    )
    result = dict(config.extra.get("wrapper", {}))
    result.update(
        architectures=["MiniMaxM3SparseForConditionalGeneration"], model_type="minimax_m3_vl", text_config=text
    )
    if config.vision is not None:
        result["vision_config"] = dict(config.vision.raw)
        result["projector_hidden_size"] = config.vision.projector_hidden_size
    if config.quantization is not None:
        result["quantization_config"] = dict(config.quantization)
    return result
