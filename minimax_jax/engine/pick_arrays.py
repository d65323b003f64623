"""From the sampling parameters of a step's rows to arrays: host code, NumPy only."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np

from minimax_jax.buckets import bucket
from minimax_jax.engine.row_state import Adjustments
from minimax_jax.engine.sampler import SamplingState
from minimax_jax.engine.scheduler import StepPlan
from minimax_jax.engine.sequence import Sequence
from minimax_jax.engine.step_arrays import side_by_side
from minimax_jax.engine.steps import PickFeatures

_NEVER = -np.inf
_BIAS_SIZES = (0, 16, 1024)  # few, since each is compiled; the last one holds what a request may ask for


def pick_features(sequences: Iterable[Sequence]) -> PickFeatures:
    """What picking has to do for these sequences."""
    params = [sequence.params for sequence in sequences]
    wanted = [p.logprobs for p in params if p.logprobs is not None]
    return PickFeatures(
        greedy=all(p.greedy for p in params),
        truncated=any(p.truncates and not p.greedy for p in params),
        penalized=any(p.penalizes for p in params),
        num_logprobs=bucket(max(wanted)) if wanted else None,
    )


def pick_parameters(
    plans: Rows[StepPlan], num_rows: int, vocab_size: int, end_ids: Rows[int]
) -> tuple[SamplingState, Adjustments]:
    """The parameters of every row, a plan for each data rank of `num_rows` rows; padding rows are greedy.

    Args:
      end_ids: end-of-text tokens, which `min_tokens` keeps away too.
    """
    shape = (len(plans), num_rows)
    temperature, min_p, presence, frequency = np.zeros((4, *shape), np.float32)
    top_p, repetition = np.ones((2, *shape), np.float32)
    top_k = np.full(shape, vocab_size, np.int32)
    seeds, streams = np.zeros((2, *shape), np.uint32)
    biases = [[_biases(row.sequence, end_ids) for row in plan.rows] for plan in plans]
    most = max((len(own) for group in biases for own in group), default=0)
    size = next(size for size in _BIAS_SIZES if size >= most)
    bias_ids = np.full((*shape, size), vocab_size, np.int32)
    bias_values = np.zeros(bias_ids.shape, np.float32)
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
    # host arrays stand for the device's until a call takes them
    state: list[Any] = list(map(side_by_side, (temperature, top_p, min_p, top_k, seeds, streams)))
    changes: list[Any] = list(map(side_by_side, (repetition, presence, frequency, bias_ids, bias_values)))
    return SamplingState(*state), Adjustments(*changes)


def changes_by_step(sequence: Sequence) -> bool:
    """Whether the parameters of the next steps are others than this one's."""
    return sequence.num_new <= sequence.params.min_tokens


def _biases(sequence: Sequence, end_ids: Rows[int]) -> dict[int, float]:
    params = sequence.params
    biases = dict(params.logit_bias or {})
    # the token that this step picks is already counted
    if sequence.num_new <= params.min_tokens:
        ends = params.stop_token_ids if params.ignore_eos else (*params.stop_token_ids, *end_ids)
        biases |= dict.fromkeys(ends, _NEVER)
    return biases
