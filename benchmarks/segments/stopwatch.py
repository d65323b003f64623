"""Times of steps: in a row, and one at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def time_steps(ways: Mapping[str, Callable[[], jax.Array]], repeats: int, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds a step of each way: ways take turns, so that drift meets all of them.

    Returns:
      per way: "step_us" in a row (median over rounds), "spread" (of that, relative), "latency_us" of a lone step.
    """
    in_a_row: dict[str, list[float]] = {name: [] for name in ways}
    alone: dict[str, list[float]] = {name: [] for name in ways}
    for name in ways:
        for _ in range(3):  # warm-up, capture, first replay
            jax.block_until_ready(ways[name]())
    for _ in range(rounds):
        for name, run in ways.items():
            jax.block_until_ready(run())
            start = time.perf_counter()
            for _ in range(repeats):
                result = run()
            jax.block_until_ready(result)
            in_a_row[name].append((time.perf_counter() - start) / repeats * 1e6)
            start = time.perf_counter()
            jax.block_until_ready(run())
            alone[name].append((time.perf_counter() - start) * 1e6)
    return {
        name: {
            "step_us": statistics.median(times),
            "spread": (max(times) - min(times)) / statistics.median(times),
            "latency_us": statistics.median(alone[name]),
        }
        for name, times in in_a_row.items()
    }


def host_times(run: Callable[[], jax.Array], layers: Any, steps: int) -> dict[str, float]:
    """Host microseconds of one segment + boundary pair, the device idle before each step.

    Args:
      layers: the segmented function that `run` calls.
    """
    jax.block_until_ready(run())
    before = layers.stats()
    for _ in range(steps):
        jax.block_until_ready(run())  # an empty queue: what is timed is the host's own work
    after = layers.stats()
    pairs = after.pairs - before.pairs
    return {
        "pair_us": (after.replay_seconds - before.replay_seconds) / pairs * 1e6,
        "boundary_us": (after.boundary_seconds - before.boundary_seconds) / pairs * 1e6,
    }


def bytes_in_use() -> int | None:
    """Of the first device; None where it does not tell."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else int(stats["bytes_in_use"])
