"""Counters of an engine."""

from __future__ import annotations

import dataclasses

from minimax_jax.engine.core import EngineCore


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """A snapshot of what an engine did and holds.

    Attributes:
      running, waiting: sequences, over all data ranks.
      num_pages, used_pages, idle_pages: of the pools: all, held by sequences, kept for reuse alone.
      reuse_asked, reuse_found: pages that starting sequences looked for and found; evicted: that gave way to others.
      preemptions: how often a sequence lost its pages.
      steps: by "kind, execution"; launches: of one or more of them.
      prompt_tokens: computed, again after preemption too; new_tokens: chosen.
      failed_steps: that the device refused.
      traces: by function; steady serving leaves them unchanged.
    """

    running: int
    waiting: int
    num_pages: int
    used_pages: int
    idle_pages: int
    reuse_asked: int
    reuse_found: int
    evicted: int
    preemptions: int
    steps: dict[str, int]
    launches: int
    prompt_tokens: int
    new_tokens: int
    failed_steps: int
    traces: dict[str, int]


def engine_stats(core: EngineCore, traces: dict[str, int]) -> EngineStats:
    """The snapshot; numbers of a running engine may be a step apart."""
    schedulers = core.schedulers
    allocators = [scheduler.allocator for scheduler in schedulers]
    return EngineStats(
        running=sum(len(scheduler.running) for scheduler in schedulers),
        waiting=sum(len(scheduler.waiting) for scheduler in schedulers),
        num_pages=sum(a.num_pages for a in allocators),
        used_pages=sum(a.num_pages - a.num_available for a in allocators),
        idle_pages=sum(a.num_idle for a in allocators),
        reuse_asked=sum(a.counts.asked for a in allocators),
        reuse_found=sum(a.counts.found for a in allocators),
        evicted=sum(a.counts.evicted for a in allocators),
        preemptions=sum(scheduler.preemptions for scheduler in schedulers),
        steps={f"{kind}, {how}": count for (kind, how), count in sorted(core.counts.steps.items())},
        launches=core.counts.launches,
        prompt_tokens=core.counts.prompt_tokens,
        new_tokens=core.counts.new_tokens,
        failed_steps=core.counts.failed_steps,
        traces=dict(traces),
    )
