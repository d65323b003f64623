"""How much of a decode step the host is busy, and how much of it the device waits."""

from __future__ import annotations

import gzip
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.engine.rank_llm import rank_llm
from minimax_jax import LLM, SamplingParams
from minimax_jax.engine.sequence import Sequence
from minimax_jax.rank_slice.trace import overlap, read_launches

PROFILED_STEPS = 10


def measure_host_share(
    layers: int, batch: int, context: int, steps: int, *, moe: bool, tiny: bool, out: Path
) -> dict[str, Any]:
    """Times decode steps of a full batch, sampled with top-k and top-p, then profiles some.

    Writes decode_trace.json.gz (for ui.perfetto.dev) to `out`.

    Returns:
      Medians in microseconds: "step_us" of the wall clock; "host_us": of these the host's own work (planning, arrays,
      launches, taking in tokens); "wait_us": for the device. "host_share" = host_us / step_us. Where the profiler
      shows kernels, "device_busy_share" of the profiled steps.
    """
    tokens = max(64 if tiny else 2048, 4 * batch)
    page = 16 if tiny else 128
    # the first sequences go on while the last one's prompt is computed, and all must outlast the measurement
    new = 2 * batch * context // (tokens - batch) + steps + PROFILED_STEPS + 40
    width = -(-(context + new) // page)
    llm = rank_llm(
        layers,
        moe=moe,
        tiny=tiny,
        max_batch_size=batch,
        max_num_tokens=tokens,
        max_seq_len=width * page,
        segment_config={"buckets": (tokens,), "enabled": "always"},
        decode_config={"batch_sizes": (batch,), "page_buckets": (width,)},
        cache_config={"max_tokens": (batch + 1) * width * page},
    )
    with llm:
        core = _core_of(llm, batch, context, new)
        times = _Times(core.runner)
        for _ in range(10):
            core.step()
        walls, waits = [], []
        for _ in range(steps):
            times.wait = 0.0
            start = time.perf_counter()
            core.step()
            walls.append(time.perf_counter() - start)
            waits.append(times.wait)
        busy = _profiled(core.step, out)
        batch_now = len(core.schedulers[0].running)
    assert batch_now == batch, "the batch has changed during the measurement"
    hosts = [wall - wait for wall, wait in zip(walls, waits, strict=True)]
    step, host = statistics.median(walls), statistics.median(hosts)
    return {
        "layers": layers,
        "batch": batch,
        "context": context,
        "moe": moe,
        "steps": steps,
        "step_us": step * 1e6,
        "host_us": host * 1e6,
        "wait_us": statistics.median(waits) * 1e6,
        "host_share": host / step,
        "device_busy_share": busy,
    }


class _Times:
    """Counts the time in which the runner waits for the device."""

    def __init__(self, runner: Any):
        self.wait = 0.0
        fetch = runner.fetch

        def timed(step: Any) -> Any:
            start = time.perf_counter()
            jax.block_until_ready(step.tokens)
            self.wait += time.perf_counter() - start
            return fetch(step)

        runner.fetch = timed


def _core_of(llm: LLM, batch: int, context: int, new: int) -> Any:
    """The engine's loop, to be stepped from here, with a batch past its prompts."""
    core = llm._core
    random = np.random.default_rng(0)
    for number in range(batch):
        params = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, max_tokens=new, ignore_eos=True, seed=number)
        prompt = random.integers(0, llm.model.config.vocab_size, context).astype(np.int32)
        core.add(Sequence(prompt, params, order=(number, 0), max_new=new, seed=number))
    while any(s.num_new < 2 for s in core.schedulers[0].running) or core.schedulers[0].waiting:
        core.step()
    return core


def _profiled(step: Callable[[], Any], out: Path) -> float | None:
    """The share of some steps in which the device ran anything; None where the profiler shows no kernels."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(PROFILED_STEPS):
                step()
        files = sorted(Path(directory).rglob("*.trace.json.gz"))
        if not files:
            return None
        shutil.copyfile(files[-1], out / "decode_trace.json.gz")
        seen = overlap(read_launches(json.loads(gzip.decompress(files[-1].read_bytes()))))
    return None if seen is None else seen.busy_us / seen.span_us
