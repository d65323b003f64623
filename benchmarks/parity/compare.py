"""Compares results: errors, tolerances, near-ties."""

from __future__ import annotations

import dataclasses

import numpy as np

ATTENTION_MAX = 2e-2
ATTENTION_MEAN = 5e-3  # mean |error| over mean |reference|
SCORE_MAX = 1e-2
SAME_ROW = 3e-2  # a row's mean relative error with the same selection; another block changes it by ten times that


@dataclasses.dataclass(frozen=True)
class Result:
    """One check. `status`: "ok", "FAILED" or "refused"."""

    op: str
    case: str
    check: str
    status: str
    detail: str = ""
    errors: dict[str, float] = dataclasses.field(default_factory=dict)


class Mismatch(AssertionError):
    """A check that failed; says where and by how much."""


def require(condition: bool, text: str) -> None:
    """Raises Mismatch(text) unless the condition holds."""
    if not condition:
        raise Mismatch(text)


def as_float(x) -> np.ndarray:
    """On the host, as float32."""
    return np.asarray(x).astype(np.float32)


def bit_equal(a, b) -> bool:
    """The same bytes, NaNs included."""
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def attention_errors(result: np.ndarray, expected: np.ndarray, live: np.ndarray) -> dict[str, float]:
    """max |error| and mean |error| / mean |reference| of the live rows, within tolerance or Mismatch."""
    got, wanted = result[live], expected[live]
    if not got.size:
        return {}
    require(bool(np.isfinite(got).all()), f"{int((~np.isfinite(got)).any(axis=(1, 2)).sum())} live rows are not finite")
    error = np.abs(got - wanted)
    errors = {"max": float(error.max()), "mean_rel": float(error.mean() / max(np.abs(wanted).mean(), 1e-30))}
    row, head = np.unravel_index(error.max(axis=-1).argmax(), error.shape[:2])
    require(
        errors["max"] <= ATTENTION_MAX, f"max error {errors['max']:.4f} > {ATTENTION_MAX} in row {row}, head {head}"
    )
    require(errors["mean_rel"] <= ATTENTION_MEAN, f"mean relative error {errors['mean_rel']:.5f} > {ATTENTION_MEAN}")
    return errors


def padding_kept(result: np.ndarray, kept: np.ndarray, live: np.ndarray) -> None:
    """Padding rows are zero without `out`, and what `out` held (NaN) with it; live rows agree bit for bit."""
    require(not result[~live].any(), "padding rows are not zero without `out`")
    require(bool(np.isnan(kept[~live]).all()), "padding rows of `out` were written")
    require(bit_equal(result[live], kept[live]), "live rows differ with and without `out`")


def score_errors(scores: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """-inf in the same places and numbers within tolerance, or Mismatch."""
    require(scores.dtype == np.float32, f"scores are {scores.dtype}: must be float32")
    require(not np.isnan(scores).any(), f"{int(np.isnan(scores).sum())} scores are NaN")
    other = np.isneginf(scores) != np.isneginf(expected)
    require(not other.any(), f"-inf where it should not be, or not where it should, at {first(other)}")
    seen = ~np.isneginf(expected)
    worst = float(np.abs(scores[seen] - expected[seen]).max()) if seen.any() else 0.0
    require(worst <= SCORE_MAX, f"max error {worst:.5f} > {SCORE_MAX}")
    return {"max": worst}


def well_formed(selected: np.ndarray, expected: np.ndarray) -> None:
    """Valid ids first and unique, -1 after them, as many as the reference has."""
    require(selected.dtype == np.int32, f"ids are {selected.dtype}: must be int32")
    require(selected.shape == expected.shape, f"shape {selected.shape}: must be {expected.shape}")
    counts = (selected >= 0).sum(axis=-1)
    wrong = counts != (expected >= 0).sum(axis=-1)
    require(not wrong.any(), f"another number of valid ids than the reference at [head, row] {first(wrong)}")
    valid_first = (selected >= 0) == (np.arange(selected.shape[-1]) < counts[..., None])
    require(bool(valid_first.all()), f"a -1 before a valid id at {first(~valid_first)}")
    require(bool((selected >= -1).all()), "an id below -1")
    ordered = np.sort(selected, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    require(not twice.any(), f"an id twice at {first(twice)}")


def different_rows(selected: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """[heads, rows]: where the two are not the same set."""
    return (np.sort(selected, axis=-1) != np.sort(expected, axis=-1)).any(axis=-1)


def score_gap(selected: np.ndarray, expected: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """[heads, rows]: largest difference of the selected scores, best against best and so on; 0 for the same set."""

    def chosen(ids: np.ndarray) -> np.ndarray:
        values = np.take_along_axis(scores, np.maximum(ids, 0), axis=-1)
        return np.sort(np.where(ids >= 0, values, 0), axis=-1)

    return np.abs(chosen(selected) - chosen(expected)).max(axis=-1)


def margin(scores: np.ndarray, positions: np.ndarray, block: int, topk: int, init: int, local: int) -> np.ndarray:
    """[heads, rows]: by how much the last block taken beats the first one left; inf where none is left."""
    blocks = np.arange(scores.shape[-1])
    own = (positions // block)[:, None]
    forced = (blocks < init) | (blocks > own - local)
    keys = np.where(forced & ~np.isneginf(scores), np.inf, scores)
    if keys.shape[-1] <= topk:
        return np.full(keys.shape[:-1], np.inf)
    ordered = -np.partition(-keys, (topk - 1, topk), axis=-1)[..., topk - 1 : topk + 1]
    with np.errstate(invalid="ignore"):
        gap = ordered[..., 0] - ordered[..., 1]
    return np.where(np.isneginf(ordered[..., 1]) | np.isnan(gap), np.inf, gap)


def row_errors(result: np.ndarray, expected: np.ndarray, selection_heads: int) -> np.ndarray:
    """[selection heads, rows]: mean |error| over mean |reference| of each row's part."""

    def split(x: np.ndarray) -> np.ndarray:
        return x.reshape(x.shape[0], selection_heads, -1)

    error = np.abs(split(result) - split(expected)).mean(axis=-1)
    return (error / np.maximum(np.abs(split(expected)).mean(axis=-1), 1e-30)).T


def first(mask: np.ndarray) -> list[int]:
    """Where a mask first holds; empty where it does not."""
    return [int(i) for i in next(iter(np.argwhere(mask)), ())]
