"""How much of a decode step the host is busy, by steps a launch, and how much of it the device waits."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from benchmarks.engine.rank_llm import rank_llm
from minimax_jax import LLM, SamplingParams
from minimax_jax.engine.core import RunAhead
from minimax_jax.engine.sequence import Sequence
from minimax_jax.engine.sequence_text import SequenceText
from minimax_jax.rank_slice.trace import overlap, read_launches
from minimax_jax.tokenizer import Tokenizer

PROFILED_STEPS, SETTLING_LAUNCHES, LEAST_LAUNCHES = 8, 4, 8
_SAMPLED = {"temperature": 0.8, "top_k": 40, "top_p": 0.95}
# what requests ask for
ROWS: dict[str, dict[str, Any]] = {
    "sampled": _SAMPLED,
    "greedy": {"temperature": 0.0},
    "penalties": {**_SAMPLED, "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1},
    "logprobs": {**_SAMPLED, "logprobs": 5},
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run decode steps: so many a launch; whether their loop lies in one CUDA graph."""

    steps_per_launch: int
    graph_loop: bool = False

    @property
    def trace(self) -> str:
        """The file that its profile goes to."""
        return f"decode_trace_{self.steps_per_launch}{'_graph' if self.graph_loop else ''}.json.gz"

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.steps_per_launch} a launch{', loop in a graph' if self.graph_loop else ''}"

    def launches(self, steps: int) -> int:
        """To time, for about `steps` steps."""
        return max(LEAST_LAUNCHES, steps // self.steps_per_launch)

    def tokens(self, steps: int) -> int:
        """Of each sequence, for all launches of a measurement."""
        profiled = max(1, PROFILED_STEPS // self.steps_per_launch)
        return (SETTLING_LAUNCHES + self.launches(steps) + profiled + 2) * self.steps_per_launch


def measure_host_share(
    layers: int,
    batch: int,
    context: int,
    steps: int,
    variants: list[Variant],
    *,
    moe: bool,
    rows: str,
    text: bool,
    tiny: bool,
    out: Path,
) -> Iterator[dict[str, Any]]:
    """Times decode steps of one full batch in each variant, then profiles some.

    Writes a profile of each (`Variant.trace`, for ui.perfetto.dev) to `out`. The sequences go on from variant to
    variant, so the last ones have longer contexts.

    Args:
      rows: of `ROWS`.
      text: whether answers have text, of a vocabulary of words of 2 to 12 bytes.

    Yields:
      For each variant its fields, and in microseconds a step, from medians over launches: "step_us" of the wall clock;
      "host_us": of these the engine thread's own work, launches included; "launch_us": of that the launches; "wait_us":
      for the device. "host_share" = host_us / step_us; "process_share": CPU time of all threads of the process over
      wall time, which counts XLA's threads too, and the polling of some. "device_busy_share" of the profiled steps,
      None where the profiler shows no kernels, or of a loop in a graph those of one step only. "refusal": why the loop
      is in no graph.
    """
    tokens = max(64 if tiny else 2048, 4 * batch)
    page = 16 if tiny else 128
    # the first sequences go on while the last one's prompt is computed, and all must outlast the measurement
    new = 2 * batch * context // (tokens - batch) + sum(variant.tokens(steps) for variant in variants) + 40
    width = -(-(context + new) // page)
    llm = rank_llm(
        layers,
        moe=moe,
        tiny=tiny,
        max_batch_size=batch,
        max_num_tokens=tokens,
        max_seq_len=width * page,
        segment_config={"buckets": (tokens,), "enabled": "always"},
        decode_config={"batch_sizes": (batch,), "page_buckets": (width,), "steps_per_launch": 1},
        cache_config={"max_tokens": (batch + 1) * width * page},
    )
    with llm:
        vocabulary = _vocabulary(llm.model.config.vocab_size) if text else None
        core = _core_of(llm, batch, context, new, ROWS[rows], vocabulary)
        times = _Times(core.runner)
        for variant in variants:
            yield dataclasses.asdict(variant) | _measured(core, times, variant, steps, out)
            assert len(core.schedulers[0].running) == batch, "the batch has changed during the measurement"


def _measured(core: Any, times: _Times, variant: Variant, steps: int, out: Path) -> dict[str, Any]:
    count = variant.steps_per_launch
    core._run_ahead = RunAhead(count)
    core.runner._decode = core.runner._steps.decoding(graphs=variant.graph_loop)
    start = time.perf_counter()
    for _ in range(SETTLING_LAUNCHES):
        core.step()
    settled = time.perf_counter() - start
    walls, waits, launches = [], [], []
    steps_before, cpu, begin = sum(core.counts.steps.values()), time.process_time(), time.perf_counter()
    for _ in range(variant.launches(steps)):
        times.wait = times.launch = 0.0
        start = time.perf_counter()
        core.step()
        walls.append(time.perf_counter() - start)
        waits.append(times.wait)
        launches.append(times.launch)
    process = (time.process_time() - cpu) / (time.perf_counter() - begin)
    made = sum(core.counts.steps.values()) - steps_before
    assert made == len(walls) * count, f"{made} steps in {len(walls)} launches of {count}"
    busy = _profiled(core.step, max(1, PROFILED_STEPS // count), out / variant.trace)
    refusal = core.runner._decode.refusal if variant.graph_loop else None
    hosts = [wall - wait for wall, wait in zip(walls, waits, strict=True)]
    a_step = {name: statistics.median(values) * 1e6 / count for name, values in
              {"step_us": walls, "host_us": hosts, "launch_us": launches, "wait_us": waits}.items()}  # fmt: skip
    return a_step | {
        "host_share": a_step["host_us"] / a_step["step_us"],
        "process_share": process,
        "device_busy_share": None if variant.graph_loop and refusal is None else busy,
        "first_launches_s": settled,
        "launches": len(walls),
        "refusal": refusal,
    }


class _Times:
    """Counts the time in which the runner launches, and in which it waits for the device."""

    def __init__(self, runner: Any):
        self.wait = self.launch = 0.0
        fetch, launch = runner.fetch, runner.launch

        def timed_fetch(step: Any) -> Any:
            start = time.perf_counter()
            jax.block_until_ready(step.tokens)
            self.wait += time.perf_counter() - start
            return fetch(step)

        def timed_launch(plans: Any) -> Any:
            start = time.perf_counter()
            step = launch(plans)
            self.launch += time.perf_counter() - start
            return step

        runner.fetch, runner.launch = timed_fetch, timed_launch


def _core_of(llm: LLM, batch: int, context: int, new: int, how: Mapping[str, Any], vocabulary: Tokenizer | None) -> Any:
    """The engine's loop, to be stepped from here, with a batch past its prompts."""
    core = llm._core
    random = np.random.default_rng(0)
    for number in range(batch):
        params = SamplingParams(max_tokens=new, ignore_eos=True, seed=number, **how)
        prompt = random.integers(0, llm.model.config.vocab_size, context).astype(np.int32)
        text = None if vocabulary is None else SequenceText(vocabulary)
        core.add(Sequence(prompt, params, order=(number, 0), max_new=new, seed=number, text=text))
    while any(s.num_new < 2 for s in core.schedulers[0].running) or core.schedulers[0].waiting:
        core.step()
    return core


def _vocabulary(size: int) -> Tokenizer:
    """A byte-level tokenizer of so many made-up words, since weights that are drawn have none."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzĠĠĠĠ"))
    words = {"".join(random.choice(letters, 1 + number % 8)) + f"{number:x}": number for number in range(size)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


def _profiled(step: Callable[[], Any], launches: int, trace: Path) -> float | None:
    """The share of some launches in which the device ran anything; None where the profiler shows no kernels."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(launches):
                step()
        files = sorted(Path(directory).rglob("*.trace.json.gz"))
        if not files:
            return None
        shutil.copyfile(files[-1], trace)
        seen = overlap(read_launches(json.loads(gzip.decompress(files[-1].read_bytes()))))
    return None if seen is None else seen.busy_us / seen.span_us
