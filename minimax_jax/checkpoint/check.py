"""Reports what a checkpoint directory holds and what is wrong with it, for `minimax-jax inspect [--check]`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minimax_jax.checkpoint.files import CheckpointFiles, scan_directory
from minimax_jax.checkpoint.names import detect_style, state_tensors
from minimax_jax.checkpoint.verify import Findings, compare
from minimax_jax.config import ConfigError, MiniMaxM3Config
from minimax_jax.paths import model_directory
from minimax_jax.tensor_table import SCALE_SUFFIX

_CHUNK_ELEMENTS = 1 << 22
_PROGRESS_DELAY = 2.0  # seconds; a check that is over sooner shows nothing


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """How many values of one tensor are NaN or infinite, of how many."""

    nan: int
    inf: int
    size: int


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What `check_checkpoint` found; `ok` if there is nothing to complain about.

    Attributes:
      directory: that was looked at.
      style: "vendor", "transformers", "transformers-vl", or None if the names are of no known style.
      tensors: how many can be read.
      ignored: of these, how many are no part of the text model (vision, projector, drafts).
      bytes_by_dtype: stored bytes by safetensors dtype, largest first.
      missing, extra, misshapen, wrong_dtype, conflicting: one line each, beginning with the tensor's name.
      bad_files: what cannot be read, one line each: config.json, index, shards.
      non_finite: tensors with NaN or infinite values, if the values were read.
      values_read: whether they were.
    """

    directory: Path
    style: str | None
    tensors: int
    ignored: int
    bytes_by_dtype: dict[str, int]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[str, ...]
    wrong_dtype: tuple[str, ...]
    conflicting: tuple[str, ...]
    bad_files: tuple[str, ...]
    non_finite: dict[str, NonFinite]
    values_read: bool

    @property
    def non_finite_lines(self) -> tuple[str, ...]:
        """One line for each tensor with NaN or infinite values."""
        return tuple(
            f"{name}: {found.nan} NaN and {found.inf} infinite of {found.size} values"
            for name, found in self.non_finite.items()
        )

    @property
    def problems(self) -> tuple[str, ...]:
        """Every complaint, one line each."""
        named = (*self.missing, *self.misshapen, *self.wrong_dtype, *self.conflicting, *self.extra)
        return (*self.bad_files, *named, *self.non_finite_lines)

    @property
    def ok(self) -> bool:
        """Whether it loads (and, if the values were read, has finite weights only)."""
        return not self.problems


def check_checkpoint(directory: str | Path, *, read_values: bool = False, progress: bool = False) -> CheckReport:
    """Looks at every header, and with `read_values` at every value, and reports; bad content never raises.

    An MXFP8 scale byte of 255 counts as NaN, under the scale's name.

    Args:
      directory: a model directory; "tiny" is the embedded checkpoint.
      read_values: also look for NaN and infinite weights, which reads the whole checkpoint.
      progress: a bar on stderr when that takes more than two seconds.
    """
    try:
        path = model_directory(directory)
    except FileNotFoundError as error:
        return _report(Path(directory), None, CheckpointFiles(Path(directory), {}), 0, Findings(), [str(error)], None)
    files, bad_files = scan_directory(path)
    with files:
        config: MiniMaxM3Config | None = None
        try:
            config = MiniMaxM3Config.from_pretrained(path)
        except (ConfigError, OSError) as error:
            bad_files.append(str(error))
        style = detect_style(files.names())
        findings = Findings()
        if style is None and files.names():
            bad_files.append("no tensor name starts as MiniMax-M3's do")
        elif style is not None and config is not None:
            findings = compare(files, config, style, state_tensors(config, style))
        ignored = sum(style.ignores(name) for name in files.names()) if style else 0
        values = _non_finite(files, progress) if read_values else None
        return _report(path, style.name if style else None, files, ignored, findings, bad_files, values)


def _report(
    directory: Path,
    style: str | None,
    files: CheckpointFiles,
    ignored: int,
    findings: Findings,
    bad_files: list[str],
    values: dict[str, NonFinite] | None,
) -> CheckReport:
    sizes: dict[str, int] = {}
    for name in files.names():
        sizes[files.dtype(name)] = sizes.get(files.dtype(name), 0) + files.num_bytes(name)
    return CheckReport(
        directory=directory,
        style=style,
        tensors=len(files.names()),
        ignored=ignored,
        bytes_by_dtype=dict(sorted(sizes.items(), key=lambda item: -item[1])),
        bad_files=tuple(bad_files),
        non_finite=values or {},
        values_read=values is not None,
        **{field.name: getattr(findings, field.name) for field in dataclasses.fields(findings)},
    )


def _non_finite(files: CheckpointFiles, progress: bool) -> dict[str, NonFinite]:
    """The tensors that hold NaN or infinite values."""
    found: dict[str, NonFinite] = {}
    bar = tqdm(
        total=sum(files.num_bytes(name) for name in files.names()), desc="Checking values", unit="B", unit_scale=True,
        file=sys.stderr, delay=_PROGRESS_DELAY, disable=not progress, leave=False,
    )  # fmt: skip
    with bar:
        for name in files.names():
            nan, inf = _count_tensor(files, name, bar)
            if nan or inf:
                found[name] = NonFinite(nan, inf, int(np.prod(files.shape(name))))
    return found


def _count_tensor(files: CheckpointFiles, name: str, bar: tqdm) -> tuple[int, int]:
    """(NaN, infinite) values of a tensor, read a chunk at a time."""
    flat = files.read(name).reshape(-1)
    nan = inf = 0
    for start in range(0, flat.size, _CHUNK_ELEMENTS):
        chunk = flat[start : start + _CHUNK_ELEMENTS]
        chunk_nan, chunk_inf = _count(name, files.dtype(name), chunk)
        nan, inf = nan + chunk_nan, inf + chunk_inf
        files.release(name)
        bar.update(chunk.nbytes)
    return nan, inf


def _count(name: str, dtype: str, values: np.ndarray) -> tuple[int, int]:
    """(NaN, infinite) values of a chunk, by their bits where NumPy is slow or does not know the dtype."""
    if dtype == "F8_E8M0" or (dtype == "U8" and name.endswith(SCALE_SUFFIX)):
        return int(np.count_nonzero(values.view(np.uint8) == 0xFF)), 0
    if dtype == "F8_E4M3":
        return int(np.count_nonzero((values.view(np.uint8) & 0x7F) == 0x7F)), 0
    if dtype == "BF16":
        magnitude = values.view(np.uint16) & 0x7FFF
        return int(np.count_nonzero(magnitude > 0x7F80)), int(np.count_nonzero(magnitude == 0x7F80))
    if dtype == "F8_E5M2":
        magnitude = values.view(np.uint8) & 0x7F
        return int(np.count_nonzero(magnitude > 0x7C)), int(np.count_nonzero(magnitude == 0x7C))
    if values.dtype.kind not in "fc":
        return 0, 0
    return int(np.count_nonzero(np.isnan(values))), int(np.count_nonzero(np.isinf(values)))
