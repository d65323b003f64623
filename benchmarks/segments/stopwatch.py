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
    """Host microseconds with the device idle before each step, so that it is the host's own work that is timed.

    Args:
      layers: the segmented function that `run` calls.

    Returns:
      "host_us" of a step, until `run` returns; "outside_us": of it outside of pairs (the step's plan, what is sent, the
      checks of arguments); "pair_us" of one segment + boundary pair, and "boundary_us" of its boundary.
    """
    jax.block_until_ready(run())
    before, spent = layers.stats(), 0.0
    for _ in range(steps):
        start = time.perf_counter()
        result = run()
        spent += time.perf_counter() - start
        jax.block_until_ready(result)
    after = layers.stats()
    pairs, inside = after.pairs - before.pairs, after.replay_seconds - before.replay_seconds
    return {
        "host_us": spent / steps * 1e6,
        "outside_us": (spent - inside) / steps * 1e6,
        "pair_us": inside / pairs * 1e6,
        "boundary_us": (after.boundary_seconds - before.boundary_seconds) / pairs * 1e6,
    }


def bytes_in_use() -> int | None:
    """Of the first device; None where it does not tell."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else int(stats["bytes_in_use"])
