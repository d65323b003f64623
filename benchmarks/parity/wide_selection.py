"""select_blocks alone, from 1 to 16,384 blocks (2M tokens): exact against the reference on the same scores."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import minimax_kernels as mk
from benchmarks.parity import compare
from benchmarks.parity.checks import jitted
from benchmarks.parity.compare import Mismatch, Result, require

WIDTHS = (1, 2, 15, 16, 17, 31, 128, 129, 500, 1024, 4097, 16384)
OPTIONS = ((16, 0, 1), (8, 1, 2), (32, 0, 0), (1, 0, 1), (64, 1, 2))  # topk, init, local
FEW_ROWS, MANY_ROWS = 33, 280  # a head; of two heads the latter are more than take four warps each
KINDS = ("random", "ties", "one value", "rising", "falling", "with NaN and inf")


def check(impl: str, few: bool) -> list[Result]:
    """Every width, option and kind of scores; `few` takes fewer widths."""
    results = []
    for width in (1, 17, 128, 500) if few else WIDTHS:
        rows = FEW_ROWS if few or width > 4097 else MANY_ROWS
        for topk, init, local in OPTIONS[:1] if few else OPTIONS:
            for kind in KINDS:
                name = f"{width} blocks top{topk} init{init} local{local}"
                try:
                    _check_one(impl, width, topk, init, local, kind, rows)
                    results.append(Result("select_blocks", name, kind, "ok"))
                except Mismatch as mismatch:
                    results.append(Result("select_blocks", name, kind, "FAILED", str(mismatch)))
                except NotImplementedError as refusal:
                    results.append(Result("select_blocks", name, kind, "refused", str(refusal)))
                except Exception as error:  # noqa: BLE001 a compiler's error must not hide the others
                    text = f"{type(error).__name__}: {str(error)[:600]}"
                    results.append(Result("select_blocks", name, kind, "FAILED", text))
    return results


def _check_one(impl: str, width: int, topk: int, init: int, local: int, kind: str, rows: int) -> None:
    random = np.random.default_rng(width)
    heads, padding = 2, 3
    scores = {
        "random": lambda size: random.standard_normal(size, np.float32),
        "ties": lambda size: random.integers(-2, 2, size),
        "one value": lambda size: np.full(size, -3.5),
        "rising": lambda size: np.broadcast_to(np.arange(size[-1]), size),
        "falling": lambda size: np.broadcast_to(-np.arange(size[-1]), size),
        "with NaN and inf": lambda size: random.choice([np.nan, np.inf, 1.0, -1.0], size, p=[0.01, 0.01, 0.49, 0.49]),
    }[kind]((heads, rows, width)).astype(np.float32)
    own = random.integers(0, width, rows)  # each row's own block; block 0 and the last among them
    own[:2] = 0, width - 1
    scores = np.where(np.arange(width) <= own[:, None], scores, np.float32(-np.inf))
    scores[:, -padding:] = np.nan
    # one request a row, so that any row may stand anywhere
    starts = np.minimum(np.arange(rows + 1), rows - padding)
    batch = mk.Batch(
        jnp.zeros((rows, width), jnp.int32), jnp.asarray(starts, jnp.int32), jnp.asarray((own + 1) * 128, jnp.int32)
    )
    options = {"topk": topk, "init_blocks": init, "local_blocks": local}
    run = [jitted("select_blocks", name, **options) for name in (impl, "reference", impl)]
    selected, expected, again = (np.asarray(call(jnp.asarray(scores), batch)) for call in run)
    compare.well_formed(selected, expected)
    wrong = compare.different_rows(selected, expected)
    require(not wrong.any(), f"{int(wrong.sum())} rows select other blocks, first {_shown(wrong, selected, expected)}")
    require(compare.bit_equal(selected, again), "a repeat differs")


def _shown(wrong: np.ndarray, selected: np.ndarray, expected: np.ndarray) -> str:
    if not wrong.any():
        return "nowhere"
    head, row = compare.first(wrong)
    return f"[{head}, {row}]: {sorted(selected[head, row].tolist())}, must be {sorted(expected[head, row].tolist())}"
