"""Generation for a fixed batch of prompts: all rows sample alike, and their tokens come in columns."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jax.typing import DTypeLike

from minimax_jax.buckets import bucket, buckets_up_to
from minimax_jax.cache import PageAllocator, PagePool
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.core import EngineCore
from minimax_jax.engine.execution import check_execution
from minimax_jax.engine.generation_config import GenerationConfig
from minimax_jax.engine.runner_config import RunnerConfig
from minimax_jax.engine.sampling_params import SamplingParams
from minimax_jax.engine.scheduler import Scheduler
from minimax_jax.engine.segmented_prefill import LEAST_BUCKET
from minimax_jax.engine.sequence import Sequence
from minimax_jax.engine.step_runner import StepRunner
from minimax_jax.engine.steps import MAX_PREFILL_TOKENS, Steps


def generate_tokens(
    steps: Steps,
    leaves: list[jax.Array],
    config: MiniMaxM3Config,
    prompts: list[np.ndarray],
    options: GenerationConfig,
    *,
    max_new_tokens: int,
    seed: int,
    cache_dtype: DTypeLike,
    max_prefill_tokens: int = MAX_PREFILL_TOKENS,
    execution: str = "auto",
    pool: PagePool | None = None,
) -> Iterator[np.ndarray]:
    """Yields the new tokens [R] of every row, at most `max_new_tokens` times.

    The step after the one that is yielded already runs on the device meanwhile. A row goes on after its
    end-of-text token; the caller decides when to stop. Row r draws from stream r of the seed.

    Args:
      max_prefill_tokens: of one step; more where the rows are more, each of which takes one.
      execution: "segmented" runs prefill as segments around host-side attention and decode as one executable;
        "whole" runs both as one executable each; "eager" runs both as segments at their exact sizes; "auto"
        chooses the faster of the first two for each step.
      pool: pages to use, at least as many as the sequences need; it may be resized between tokens, though not
        below what the tables name (ValueError at the next step). None for one of its own, freed at the end.

    Raises:
      ValueError: at once, for an unknown execution or fewer than one new token; at the first token, if the pool is
        too small.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    check_execution(execution)
    params = SamplingParams(
        max_tokens=max_new_tokens,
        temperature=options.temperature if options.do_sample else 0,
        top_p=options.top_p,
        top_k=options.top_k,
        ignore_eos=True,
        detokenize=False,
    )
    sequences = [
        Sequence(prompt, params, order=(0, row), max_new=max_new_tokens, seed=seed)
        for row, prompt in enumerate(prompts)
    ]
    return _columns(steps, leaves, config, sequences, cache_dtype, max_prefill_tokens, execution, pool)


def _columns(
    steps: Steps,
    leaves: list[jax.Array],
    config: MiniMaxM3Config,
    sequences: list[Sequence],
    cache_dtype: DTypeLike,
    max_prefill_tokens: int,
    execution: str,
    pool: PagePool | None,
) -> Iterator[np.ndarray]:
    """The generator behind `generate_tokens`, whose arguments were checked."""
    groups = 1 if steps.ranks is None else steps.ranks.groups
    in_group = -(-len(sequences) // groups)  # requests go to data ranks in order
    block_size = config.index_block_size
    # the last token is never written, so the longest context is one shorter than all tokens
    pages_of = [-(-(s.num_prompt + s.max_new - 1) // block_size) for s in sequences]
    needed = max(sum(pages_of[first : first + in_group]) for first in range(0, len(sequences), in_group))
    place = leaves[0].sharding if steps.ranks is None else steps.ranks.cache_placement
    held = PagePool(config, bucket(needed), cache_dtype, place) if pool is None else pool
    if held.num_pages < needed:
        raise ValueError(f"pool has {held.num_pages} pages: must have at least {needed} for these sequences")
    try:
        # one shape for all decode steps: a call is too short to compile for each width that it passes
        runner = StepRunner(
            steps,
            leaves,
            config,
            held,
            RunnerConfig(
                in_group,
                execution,
                batch_sizes=(bucket(in_group),),
                token_buckets=buckets_up_to(MAX_PREFILL_TOKENS, LEAST_BUCKET),
                page_buckets=(bucket(max(pages_of)),),
            ),
        )
        schedulers = [
            Scheduler(
                PageAllocator(needed, reuse=False),
                page_size=block_size,
                max_batch_size=in_group,
                max_num_tokens=max(max_prefill_tokens, in_group),
            )
            for _ in range(groups)
        ]
        core = EngineCore(runner, schedulers)
        for row, sequence in enumerate(sequences):
            core.add(sequence, group=row // in_group)
        ready = 0
        while core.busy:
            for sequence in core.step():
                if sequence.error is not None:
                    raise sequence.error
            while ready < min(len(sequence.output) for sequence in sequences):
                ready += 1
                yield np.array([sequence.output[ready - 1] for sequence in sequences], np.int32)
    finally:
        if pool is None:
            held.release()
