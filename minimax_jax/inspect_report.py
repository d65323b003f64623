"""What `minimax-jax inspect` says of a checkpoint or a built-in configuration; `inspect_text` makes it tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from minimax_jax.checkpoint.check import CheckReport, check_checkpoint
from minimax_jax.config import ConfigError, MiniMaxM3Config
from minimax_jax.paths import model_directory
from minimax_jax.tensor_table import (
    MXFP8_BLOCK,
    TensorSpec,
    active_parameters,
    cache_bytes_per_token,
    count_parameters,
    tensor_table,
)

PRESETS: dict[str, Callable[[], MiniMaxM3Config]] = {
    "m3": MiniMaxM3Config.m3,
    "m3-mxfp8": MiniMaxM3Config.m3_mxfp8,
}
TENSOR_RANKS = (1, 2, 4, 8)
_NOT_TEXT = ("vision tower", "projector")
_VOCABULARY = ("embedding", "head")
_REPLICATED = ("norms", "routers")


@dataclasses.dataclass(frozen=True)
class Component:
    """Parameters of one part of the model, and how many of them one token meets."""

    name: str
    parameters: int
    active: int


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """What one of `tensor_ranks` devices holds of the text model.

    Attributes:
      tensor_ranks: devices over which each layer is split (TP).
      bfloat16_bytes: of weights, with MXFP8 ones dequantised; routers stay float32.
      mxfp8_bytes: of weights as an MXFP8 checkpoint stores them; None for other checkpoints.
      cache_bytes_per_token: of keys, values and index keys of all layers, in bfloat16.
      cannot_split: why there is no such layout; then the numbers above are 0. Empty if there is one.
    """

    tensor_ranks: int
    bfloat16_bytes: int
    mxfp8_bytes: int | None
    cache_bytes_per_token: int
    cannot_split: str = ""


@dataclasses.dataclass(frozen=True)
class InspectReport:
    """Everything that is shown.

    Attributes:
      name: as asked for.
      config: None if there is none to be read.
      components: of the whole model, largest first.
      memory: by tensor ranks.
      stored_bytes: by dtype: of the files, or for a built-in configuration of the released files.
      check: what the files hold and what is wrong with them; None for a built-in configuration.
    """

    name: str
    config: MiniMaxM3Config | None
    components: tuple[Component, ...]
    memory: tuple[DeviceMemory, ...]
    stored_bytes: dict[str, int]
    check: CheckReport | None

    @property
    def ok(self) -> bool:
        """Whether there is nothing to complain about."""
        return self.check is None or self.check.ok

    @property
    def problems(self) -> dict[str, tuple[str, ...]]:
        """Every complaint by kind, kinds without one left out."""
        if self.check is None:
            return {}
        c = self.check
        kinds = {
            "files": c.bad_files,
            "missing": c.missing,
            "unexpected": c.extra,
            "wrong shape": c.misshapen,
            "wrong dtype": c.wrong_dtype,
            "conflicting": c.conflicting,
            "not finite": c.non_finite_lines,
        }
        return {kind: lines for kind, lines in kinds.items() if lines}


def inspect_model(name: str, *, read_values: bool = False) -> InspectReport:
    """The report on a checkpoint directory, or on a built-in configuration ("m3", "m3-mxfp8").

    Args:
      name: a directory ("./m3" for one called like a built-in configuration), "tiny", or a preset's name.
      read_values: also look for NaN and infinities, which reads the whole checkpoint.

    Raises:
      FileNotFoundError: if there is no such directory.
      ValueError: if the values of a built-in configuration are asked for.
    """
    if name in PRESETS:
        if read_values:
            raise ValueError(f"--check: needs a directory with weights; {name} is a built-in configuration")
        return build_report(name, PRESETS[name](), None)
    try:
        directory = model_directory(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; built-in configurations: {', '.join(PRESETS)}") from None
    config: MiniMaxM3Config | None = None
    with suppress(ConfigError, OSError):  # the check says what is wrong
        config = MiniMaxM3Config.from_pretrained(directory)
    return build_report(name, config, check_checkpoint(directory, read_values=read_values, progress=True))


def build_report(name: str, config: MiniMaxM3Config | None, check: CheckReport | None) -> InspectReport:
    """The report from what was read; `check` is None for a configuration without files."""
    if config is None:
        return InspectReport(name, None, (), (), dict(check.bytes_by_dtype) if check else {}, check)
    return InspectReport(
        name,
        config,
        components(config),
        tuple(device_memory(config, ranks) for ranks in TENSOR_RANKS),
        dict(check.bytes_by_dtype) if check else _bytes_by_dtype(config),
        check,
    )


def components(config: MiniMaxM3Config) -> tuple[Component, ...]:
    """Parameters by component, largest first."""
    active = active_parameters(config)
    return tuple(Component(name, count, active[name]) for name, count in count_parameters(config).items())


def device_memory(config: MiniMaxM3Config, tensor_ranks: int) -> DeviceMemory:
    """What each of `tensor_ranks` devices holds when every layer of the text model is split over them.

    Matrices are split by heads, widths and vocabulary (whose rows are rounded up). Key and value heads are split
    as far as they go and replicated beyond, index query heads too; index keys, norms and routers are replicated.
    """
    problem = _cannot_split(config, tensor_ranks)
    if problem:
        return DeviceMemory(tensor_ranks, 0, None, 0, problem)
    kv_heads = max(1, config.num_key_value_heads // tensor_ranks)
    return DeviceMemory(
        tensor_ranks,
        _weight_bytes(config.replace(quantization=None), tensor_ranks),
        _weight_bytes(config, tensor_ranks) if config.is_mxfp8 else None,
        cache_bytes_per_token(config, kv_heads),
    )


def _weight_bytes(config: MiniMaxM3Config, tensor_ranks: int) -> int:
    table = tensor_table(config).items()
    return sum(_bytes_on_device(name, spec, config, tensor_ranks) for name, spec in table)


def _bytes_on_device(name: str, spec: TensorSpec, config: MiniMaxM3Config, tensor_ranks: int) -> int:
    if spec.component in _NOT_TEXT:
        return 0
    if spec.component in _REPLICATED or ".index_k_proj." in name:
        return spec.num_bytes
    if spec.component in _VOCABULARY:
        rows = spec.shape[0]
        return spec.num_bytes // rows * -(-rows // tensor_ranks)
    parts = tensor_ranks
    if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
        parts = min(parts, config.num_key_value_heads)
    elif ".index_q_proj." in name:
        parts = min(parts, config.index_n_heads)
    return spec.num_bytes // parts


def _cannot_split(config: MiniMaxM3Config, tensor_ranks: int) -> str:
    """Why the model has no layout over so many ranks; empty if it has one."""
    if config.num_attention_heads % tensor_ranks:
        return f"num_attention_heads = {config.num_attention_heads} is no multiple of {tensor_ranks}"
    for key in ("num_key_value_heads", "index_n_heads"):
        heads = getattr(config, key)
        if heads % tensor_ranks and tensor_ranks % heads:
            return f"{key} = {heads} is neither a multiple nor a divisor of {tensor_ranks}"
    moe = [config.is_moe(i) for i in range(config.num_hidden_layers)]
    widths = ["intermediate_size", "shared_intermediate_size"] if any(moe) else []
    widths += [] if all(moe) else ["dense_intermediate_size"]
    for key in widths:
        block = MXFP8_BLOCK if config.is_mxfp8 else 1  # inputs that share a scale stay together
        if tensor_ranks > 1 and getattr(config, key) % (tensor_ranks * block):
            return f"{key} = {getattr(config, key)} is no multiple of {tensor_ranks * block}"
    return ""


def _bytes_by_dtype(config: MiniMaxM3Config) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for spec in tensor_table(config).values():
        sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.num_bytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def render_json(report: InspectReport) -> str:
    """The report as one JSON object."""
    config, check = report.config, report.check
    content: dict[str, Any] = {"name": report.name, "ok": report.ok}
    if config is not None:
        values = dataclasses.asdict(dataclasses.replace(config, vision=None, extra={}))
        content["config"] = {key: value for key, value in values.items() if key not in ("vision", "extra")}
        content["parameters"] = {
            "total": config.num_parameters(),
            "active_per_token": sum(active_parameters(config).values()),
            "components": [dataclasses.asdict(row) for row in report.components],
        }
        content["memory_per_device"] = [dataclasses.asdict(row) for row in report.memory]
    content["stored_bytes"] = report.stored_bytes
    if check is not None:
        content["files"] = {
            "directory": str(check.directory),
            "names": check.style,
            "tensors": check.tensors,
            "outside_text_model": check.ignored,
            "values_read": check.values_read,
        }
    content["problems"] = report.problems
    return json.dumps(content, indent=2)
