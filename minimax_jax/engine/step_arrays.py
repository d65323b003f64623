"""From the plan of a step to the arrays that the device gets: host code, NumPy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Rows

import numpy as np
from jaxtyping import Int

from minimax_jax.engine.scheduler import PlannedRow, StepPlan
from minimax_jax.engine.sequence import NO_SLOT


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Sizes of one step's arrays, for each data rank.

    Attributes:
      tokens, rows: T and R, padding included; pages: the width of the block tables.
    """

    tokens: int
    rows: int
    pages: int


@dataclasses.dataclass(frozen=True)
class StepArrays:
    """One step on the host, data ranks one after the other on axis 0; see `StepInputs` and `PickInputs`.

    Attributes:
      row_slots, writes: `slots` and `writes` of `PickInputs`; the rest as in `StepInputs` and `Batch`.
      num_chosen: tokens that a row chooses.
    """

    tokens: Int[np.ndarray, "T"]
    sources: Int[np.ndarray, "T"]
    positions: Int[np.ndarray, "T"]
    slots: Int[np.ndarray, "T"]
    block_tables: Int[np.ndarray, "R N"]
    query_starts: Int[np.ndarray, "R+1"]
    kv_lens: Int[np.ndarray, "R"]
    last: Int[np.ndarray, "R"]
    row_slots: Int[np.ndarray, "R"]
    writes: Int[np.ndarray, "R"]
    num_chosen: Int[np.ndarray, "R"]


def side_by_side(array: np.ndarray) -> np.ndarray:
    """[data ranks, rows, ...] as [data ranks * rows, ...]."""
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])


class SlotTables:
    """Block tables by slot, of which only what has changed is written before a step."""

    def __init__(self, num_slots: int, most_pages: int):
        self._tables = np.zeros((num_slots, most_pages), np.int32)
        self._filled = [0] * num_slots

    def rows(self, rows: Rows[PlannedRow], num_pages: int) -> Int[np.ndarray, "R N"]:
        """The tables of a plan's rows; entries past a sequence's pages hold whatever was there."""
        slots = []
        for row in rows:
            slot, pages = row.sequence.slot, row.sequence.pages
            assert pages is not None and slot != NO_SLOT
            filled = 0 if row.begins else self._filled[slot]
            if len(pages.table) > filled:
                self._tables[slot, filled : len(pages.table)] = pages.table[filled:]
                self._filled[slot] = len(pages.table)
            slots.append(slot)
        return self._tables[slots, :num_pages]


def step_arrays(
    plans: Rows[StepPlan], tables: Rows[SlotTables], shape: StepShape, *, page_size: int, num_slots: int
) -> StepArrays:
    """The arrays of one step, a plan for each data rank; ranks without rows take part with padding.

    Args:
      num_slots: S, which stands for no slot.
    """
    groups = len(plans)
    tokens, positions = np.zeros((2, groups, shape.tokens), np.int32)
    sources, slots = np.full((2, groups, shape.tokens), -1, np.int32)
    block_tables = np.zeros((groups, shape.rows, shape.pages), np.int32)
    query_starts = np.zeros((groups, shape.rows + 1), np.int32)
    kv_lens, last, row_slots, num_chosen = np.zeros((4, groups, shape.rows), np.int32)
    writes = np.full((groups, shape.rows), num_slots, np.int32)
    for group, plan in enumerate(plans):
        rows, number = plan.rows, len(plan.rows)
        if not rows:
            continue
        counts = np.array([row.num_tokens for row in rows], np.int32)
        starts = np.array([row.start for row in rows], np.int32)
        ends = np.cumsum(counts, dtype=np.int32)
        total = int(ends[-1])
        at = np.repeat(np.arange(number), counts)
        positions[group, :total] = np.arange(total, dtype=np.int32) - (ends - counts)[at] + starts[at]
        for row, end in zip(rows, ends.tolist(), strict=True):
            sequence = row.sequence
            known = min(row.start + row.num_tokens, sequence.num_known) - row.start
            if known > 0:
                tokens[group, end - row.num_tokens : end - row.num_tokens + known] = sequence.known[
                    row.start : row.start + known
                ]
            if known < row.num_tokens:  # the newest token is still on the device
                sources[group, end - 1] = sequence.slot
        block_tables[group, :number] = tables[group].rows(rows, shape.pages)
        places = positions[group, :total]
        pages = block_tables[group][at, places // page_size]
        slots[group, :total] = pages * page_size + places % page_size
        query_starts[group, 1 : number + 1] = ends
        query_starts[group, number + 1 :] = total
        kv_lens[group, :number] = starts + counts
        last[group, :number] = ends - 1
        row_slots[group, :number] = [row.sequence.slot for row in rows]
        chosen = np.array([row.num_chosen for row in rows], np.int32)
        writes[group, :number] = np.where(chosen > 0, row_slots[group, :number], num_slots)
        num_chosen[group, :number] = chosen
    return StepArrays(
        *map(
            side_by_side,
            (
                tokens, sources, positions, slots, block_tables, query_starts, kv_lens, last, row_slots, writes,
                num_chosen,
            ),
        )
    )  # fmt: skip
