"""Launch parameters by shape, measured on an H100 and an H200: a table (scripts/tune.py), formulas beside it."""

from __future__ import annotations

import dataclasses

from minimax_kernels.measured_launches import ATTEND_DECODE, ATTEND_DECODE_FP8, ATTEND_FEW, PAGE, Table
from minimax_kernels.triton_call import Launch, ceil_div, floor_power_of_two

NUM_SMS = 132
LEAST_ROWS = 16  # of queries in a matrix product


@dataclasses.dataclass(frozen=True)
class ScoreLaunch:
    """Of `index_score`.

    Attributes:
      tile: query tokens of a program.
      blocks_per_program: pages of keys that a program scores.
      keys_first: keys on the M side of the matrix instruction, queries on its N side.
    """

    tile: int
    blocks_per_program: int
    launch: Launch
    keys_first: bool = False


def score_launch(num_tokens: int, num_blocks: int, num_heads: int, mean_rows: int, *, fp8: bool = False) -> ScoreLaunch:
    """For queries whose requests have `mean_rows` rows on average, rounded up to a power of two.

    Args:
      fp8: whether keys are cached in 8 bits: half the bytes under way in a page, so more pages of them.
    """
    if mean_rows <= 16:
        tile = min(mean_rows, max(64 // num_heads, 1))
        pages = ceil_div(num_tokens, tile) * num_blocks
        at_once = ceil_div(pages, NUM_SMS * 3)  # three programs a multiprocessor: all pages in one go
        if fp8:
            return ScoreLaunch(tile, min(max(at_once, 1), 8), Launch(4, 3), keys_first=True)
        per_program = min(at_once, 3) if pages <= NUM_SMS * 12 else 2 if pages < NUM_SMS * 300 else 4
        # so few rows as the first operand need no second buffer for a page: six programs fit, not three
        return ScoreLaunch(tile, per_program, Launch(4, 2), keys_first=tile * num_heads > LEAST_ROWS)
    tile = max(128 // num_heads, 32)
    tiles = ceil_div(num_tokens, tile)
    per_program = min(max(tiles * num_blocks // (NUM_SMS * 4), 2), 32)
    return ScoreLaunch(tile, per_program, Launch(4, 2))


MOST_RANKED_BLOCKS = 128  # blocks a request up to which the attention kernel of few queries selects by itself


def select_launch(num_rows: int, num_blocks: int) -> Launch:
    """A warp a row of scores; more of them where there are few rows and each is long."""
    return Launch(4 if num_rows <= NUM_SMS * 4 and num_blocks > 512 else 1, 1)


MOST_SPLITS = 32  # partial results that the last program of a tile merges
MERGE_ROWS = 8  # query heads of a program that merges partial results
MERGE_LAUNCH = Launch(num_warps=4, num_stages=1)


@dataclasses.dataclass(frozen=True)
class AttendLaunch:
    """Of attention over a list of pages.

    Attributes:
      tile: query tokens of a program (1 where each token has pages of its own).
      blocks_per_program: pages that a program walks; more make fewer partial results.
      keys_per_step: keys of one step of the running softmax, a part of a page.
    """

    tile: int
    blocks_per_program: int
    keys_per_step: int
    launch: Launch


def attend_launch(
    num_tokens: int, groups: int, blocks: int, rows_per_token: int, *, prefill: bool = False, fp8: bool = False
) -> AttendLaunch:
    """For tokens with lists of `blocks` pages each: enough programs to fill the device.

    Args:
      rows_per_token: query heads a group.
      prefill: neighbouring tokens find each other's pages in the second-level cache: more programs pay.
      fp8: whether caches hold 8 bits a number.
    """
    programs = num_tokens * groups
    table = ATTEND_FEW if prefill else ATTEND_DECODE_FP8 if fp8 else ATTEND_DECODE
    measured = _measured_at(table, rows_per_token, programs)
    if measured is None:
        least = 1 if not prefill or programs <= NUM_SMS else 3 if groups == 1 else 2
        measured = max(round(NUM_SMS * 2 / programs), least), 64, 4, 2 if prefill else 3
    splits, keys_per_step, num_warps, num_stages = measured
    per_program = ceil_div(blocks, min(splits, blocks, MOST_SPLITS))
    if per_program == 1:  # one step a program: nothing to pipeline
        return AttendLaunch(1, 1, 128, Launch(4, 1))
    return AttendLaunch(1, per_program, keys_per_step, Launch(num_warps, num_stages))


def _measured_at(table: Table, rows: int, size: int) -> tuple[int, ...] | None:
    """What was measured for this size or the next larger one; None beyond those and for other heads."""
    fitting = [known for heads, known in table if heads == rows and known >= size]
    return table[rows, min(fitting)] if fitting else None


def dense_launch(num_tokens: int, num_blocks: int, rows_per_token: int, groups: int, tile: int) -> AttendLaunch:
    """For all pages of a request: tiles of 128 query rows where there are that many."""
    tile = min(tile, floor_power_of_two(max(128 // rows_per_token, 1)))
    programs = ceil_div(num_tokens, tile) * groups
    splits = min(max(ceil_div(NUM_SMS * 4, programs), 1), num_blocks, MOST_SPLITS)
    rows = tile * rows_per_token
    return AttendLaunch(tile, ceil_div(num_blocks, splits), 64, Launch(8 if rows >= 128 else 4, 3))


QUERY_BYTES = 64 << 20  # of queries whose pairs are sorted together, with 128 channels


@dataclasses.dataclass(frozen=True)
class PageLaunch:
    """Of sparse attention page by page.

    Attributes:
      rows: query rows of one matrix product, a multiple of a group's heads.
      pairs_per_program: pairs (query, block) of one program, a power of two.
      workspace_bytes: what the partial results may take; longer batches run in chunks.
      window: tokens whose pairs are sorted together.
    """

    rows: int
    pairs_per_program: int
    workspace_bytes: int
    launch: Launch
    window: int


def page_launch(num_tokens: int, rows_per_token: int, groups: int, topk: int) -> PageLaunch:
    """Tiles of 64 rows; programs of several tiles where there are enough of them.

    A window is as many tokens as have 64 MB of queries, about what the second-level cache keeps. Partial results take
    2 GiB at most.
    """
    queries = max(64 // rows_per_token, 1)
    tiles = ceil_div(num_tokens * topk * groups, queries)
    measured = _measured_at(PAGE, rows_per_token, tiles)
    if measured is None:
        per_slot = tiles // (NUM_SMS * 4)
        measured = 32 if per_slot >= 128 else floor_power_of_two(min(max(per_slot, 1), 16)), 4
    tiles_per_program, num_warps = measured
    window = max(QUERY_BYTES // (groups * rows_per_token * 256), 1)
    return PageLaunch(queries * rows_per_token, queries * tiles_per_program, 2 << 30, Launch(num_warps, 1), window)


WRITE_TOKENS = 16  # tokens of a program that writes to pages
WRITE_LAUNCH = Launch(num_warps=4, num_stages=1)

NORM_LAUNCH = Launch(num_warps=4, num_stages=1)


def norm_rows(num_rows: int) -> int:
    """Heads of a program of `norm_rope`: few where there are few, so that they spread over the device."""
    return 8 if num_rows < NUM_SMS * 64 else 16
