"""What a user sets of the engine: caches, segments, decode batches."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any, TypeVar

from minimax_jax.cache import check_cache_dtype
from minimax_jax.integers import integer_within, require_integer

Config = TypeVar("Config")
MOST_STEPS = 256  # of one launch
_AUTO_STEPS = 16


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Pages for keys, values and index keys.

    Attributes:
      free_memory_fraction: of the device's memory, for everything: weights, steps and, with what is left, pages. On a
        device that does not tell its memory (a CPU) `max_tokens` decides.
      max_tokens: at most so many tokens in the pages of a data rank; None for what memory there is, on a CPU for
        `max_batch_size` sequences of full length, or 1 GiB if that is less.
      page_size: tokens a page; must be the model's sparse block.
      dtype: "auto" for the weights', "bfloat16", "float32", or "fp8": e4m3 in half of bfloat16's bytes.
      enable_reuse: whether prompts reuse pages that hold their beginning.
    """

    free_memory_fraction: float = 0.9
    max_tokens: int | None = None
    page_size: int = 128
    dtype: str = "auto"
    enable_reuse: bool = True

    def __post_init__(self) -> None:
        fraction: Any = self.free_memory_fraction
        real = isinstance(fraction, numbers.Real) and not isinstance(fraction, bool)
        if not real or not 0 < fraction <= 1:
            raise ValueError(f"free_memory_fraction = {fraction!r}: must be a number within (0, 1]")
        object.__setattr__(self, "free_memory_fraction", float(fraction))
        for name in ("max_tokens", "page_size"):
            value = getattr(self, name)
            if value is not None or name != "max_tokens":
                object.__setattr__(self, name, require_integer(name, value, 1))
        check_cache_dtype(self.dtype, "dtype")
        _require_bools(self, "enable_reuse")


@dataclasses.dataclass(frozen=True)
class SegmentConfig:
    """How steps run that hold parts of prompts.

    Attributes:
      buckets: tokens to compile for; None for powers of two and three quarters of these up to `max_num_tokens`.
      enabled: whether they run as segments around host-side attention, where that is the faster way (True), always
        ("always") or never (False).
    """

    buckets: tuple[int, ...] | None = None
    enabled: bool | str = True

    def __post_init__(self) -> None:
        if self.buckets is not None:
            object.__setattr__(self, "buckets", _sizes("buckets", self.buckets))
        if self.enabled not in (True, False, "always"):
            raise ValueError(f"enabled = {self.enabled!r}: must be True, False or 'always'")

    @property
    def execution(self) -> str:
        """The name in `engine/execution.py`."""
        return {True: "auto", False: "whole", "always": "segmented"}[self.enabled]


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How steps run in which every sequence takes one token.

    Attributes:
      batch_sizes: to compile for; None for powers of two up to `max_batch_size`.
      enable_padding: whether a batch is padded up to one of them; without it each size that occurs is compiled.
      page_buckets: widths of block tables to compile for, of all steps; None for 8, 32, 128, ..., on a CPU for powers
        of two and three quarters of these.
      steps_per_launch: steps that one executable takes while no prompt waits to be computed; their tokens are read
        together. "auto" for 16 on a GPU, where launching a step takes the host longer than the device needs for it, but
        1 while anybody streams (`generate_async`), and on a CPU.
      graph_loops: whether on a GPU such steps are compiled into one CUDA graph with a loop in it, where the driver can;
        with it a launch costs the host as much as one step's.
    """

    batch_sizes: tuple[int, ...] | None = None
    enable_padding: bool = True
    page_buckets: tuple[int, ...] | None = None
    steps_per_launch: int | str = "auto"
    graph_loops: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "page_buckets"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _sizes(name, getattr(self, name)))
        _require_bools(self, "enable_padding", "graph_loops")
        steps = self.steps_per_launch
        if isinstance(steps, str) and steps == "auto":
            return
        if (number := integer_within(steps, 1, MOST_STEPS)) is None:
            raise ValueError(f"steps_per_launch = {steps!r}: must be an integer within 1..{MOST_STEPS}, or 'auto'")
        object.__setattr__(self, "steps_per_launch", number)

    def steps_on(self, platform: str) -> int:
        """Steps of a launch on "gpu", "cpu", ..., where nothing speaks against more than one."""
        if isinstance(self.steps_per_launch, str):
            return 1 if platform == "cpu" else _AUTO_STEPS
        return self.steps_per_launch


def config_from(name: str, kind: type[Config], value: Config | Mapping[str, Any] | None) -> Config:
    """A config of a kind from one, a dict in its place, or None for the defaults.

    Raises:
      ValueError: for unknown keys or impossible values; the message names argument and key.
    """
    if value is None:
        return kind()
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: must be a {kind.__name__} or a dict, got {type(value).__name__}")
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(set(value) - set(known)):
        raise ValueError(f"{name} has {unknown[0]!r}: must be of {', '.join(known)}")
    try:
        return kind(**value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _require_bools(config: object, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"{name} = {getattr(config, name)!r}: must be True or False")


def _sizes(name: str, sizes: Any) -> tuple[int, ...]:
    given = list(sizes) if isinstance(sizes, (list, tuple)) or getattr(sizes, "ndim", 0) == 1 else []
    found = [number for size in given if (number := integer_within(size, 1)) is not None]
    if not given or len(found) < len(given):
        raise ValueError(f"{name} = {sizes!r}: must be a list of integers >= 1")
    return tuple(sorted(set(found)))
