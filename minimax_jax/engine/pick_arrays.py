"""From the sampling parameters of a step's rows to arrays: host code, NumPy only."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np

from minimax_jax.buckets import bucket
from minimax_jax.engine.row_state import Adjustments
from minimax_jax.engine.sampler import SamplingState
from minimax_jax.engine.scheduler import StepPlan
from minimax_jax.engine.sequence import Sequence
from minimax_jax.engine.step_arrays import side_by_side
from minimax_jax.engine.step_inputs import EVERYTHING, GREEDY, SAMPLED, PickFeatures

# few, since each is compiled; the last one holds what a request may ask for
_BIAS_SIZES, _END_SIZES = (0, 16, 1024), (16, 1024)


def pick_features(sequences: Rows[Sequence]) -> PickFeatures:
    """What picking has to do for these sequences."""
    params = [sequence.params for sequence in sequences]
    wanted = [p.logprobs for p in params if p.logprobs is not None]
    return PickFeatures(
        greedy=all(p.greedy for p in params),
        truncated=any(p.truncates and not p.greedy for p in params),
        penalized=any(p.penalizes for p in params),
        held=any(map(held_back, sequences)),
        num_logprobs=bucket(max(wanted)) if wanted else None,
    )


def loop_features(sequences: Rows[Sequence], end_ids: Rows[int]) -> PickFeatures:
    """The same for a loop of several steps: one of `LOOP_FEATURES`."""
    asked = pick_features(sequences)
    biased = any(s.params.logit_bias or len(s.params.ends(end_ids)) > _END_SIZES[0] for s in sequences)
    if asked.penalized or asked.held or asked.num_logprobs is not None or biased:
        return EVERYTHING
    return GREEDY if asked.greedy else SAMPLED


def pick_parameters(
    plans: Rows[StepPlan], num_rows: int, vocab_size: int, end_ids: Rows[int], *, widest: bool = False
) -> tuple[SamplingState, Adjustments]:
    """The parameters of every row, a plan for each data rank of `num_rows` rows; padding rows are greedy.

    Args:
      end_ids: end-of-text tokens.
      widest: whether biases and ends take the largest of their sizes, whatever is asked for.
    """
    shape = (len(plans), num_rows)
    temperature, min_p, presence, frequency = np.zeros((4, *shape), np.float32)
    top_p, repetition = np.ones((2, *shape), np.float32)
    top_k = np.full(shape, vocab_size, np.int32)
    seeds, streams = np.zeros((2, *shape), np.uint32)
    ends_from = np.zeros(shape, np.int32)
    biases = [[row.sequence.params.logit_bias or {} for row in plan.rows] for plan in plans]
    ends = [[row.sequence.params.ends(end_ids) for row in plan.rows] for plan in plans]
    bias_ids = np.full((*shape, _size(_BIAS_SIZES, biases, widest)), vocab_size, np.int32)
    bias_values = np.zeros(bias_ids.shape, np.float32)
    end_tokens = np.full((*shape, _size(_END_SIZES, ends, widest)), vocab_size, np.int32)
    for group, plan in enumerate(plans):
        for number, row in enumerate(plan.rows):
            sequence, p, at = row.sequence, row.sequence.params, (group, number)
            temperature[at], top_p[at], min_p[at] = p.temperature, p.top_p, p.min_p
            if p.top_k:
                top_k[at] = min(p.top_k, vocab_size)
            seeds[at], streams[at] = sequence.seed, sequence.order[1]
            if p.penalizes:
                repetition[at], presence[at] = p.repetition_penalty, p.presence_penalty
                frequency[at] = p.frequency_penalty
            if own := biases[group][number]:
                bias_ids[at][: len(own)], bias_values[at][: len(own)] = list(own), list(own.values())
            end_tokens[at][: len(ends[group][number])] = ends[group][number]
            ends_from[at] = sequence.num_prompt + p.min_tokens
    # host arrays stand for the device's until a call takes them
    state: list[Any] = list(map(side_by_side, (temperature, top_p, min_p, top_k, seeds, streams)))
    fields = (repetition, presence, frequency, bias_ids, bias_values, end_tokens, ends_from)
    changes: list[Any] = list(map(side_by_side, fields))
    return SamplingState(*state), Adjustments(*changes)


def held_back(sequence: Sequence) -> bool:
    """Whether a step that was just planned may choose a token before which the sequence must not end."""
    # by what the host has read: true for a few steps too many, in which positions decide on the device
    return sequence.params.min_tokens > 0 and sequence.num_known - sequence.num_prompt < sequence.params.min_tokens


def _size(sizes: Rows[int], values: Iterable[Iterable[Sized]], widest: bool) -> int:
    if widest:
        return sizes[-1]
    most = max((len(own) for group in values for own in group), default=0)
    return next(size for size in sizes if size >= most)
