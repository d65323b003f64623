"""Step times of M3 at full width over a mesh; collectives, shared-out index keys, segments, another pool."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.multi_gpu.collective_share import collective_share
from benchmarks.multi_gpu.mesh_model import Case, MeshModel, WholeStep
from benchmarks.multi_gpu.weights import ITEMSIZES, M3_LAYERS, MAKERS, layers_and_pages, model_config
from benchmarks.segments.stopwatch import time_steps
from minimax_jax.engine.segmented_prefill import SegmentedPrefill
from minimax_jax.parallel import ParallelConfig, Ranks
from minimax_jax.rank_slice.trace import profile

_THREADS = 4  # that compile
_RESERVE = 10 << 30  # bytes of a device for steps: rows of experts, scores, what XLA keeps


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured, and how large.

    Attributes:
      size: as `model_config` takes it.
      chunks, prefixes: tokens of prefill steps, and of context before them.
      batches, contexts: requests of decode steps, and tokens of context each.
      split: batches that are run with shared-out index keys too.
      repeats, rounds: as `time_steps` takes them, for decode; prefill takes fewer.
    """

    size: str
    chunks: tuple[int, ...]
    prefixes: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    split: tuple[int, ...]
    repeats: int
    rounds: int


FULL = Plan("full", (8192, 2048), (0, 57344), (8, 64, 1, 32), (8192, 32768), (8, 64), repeats=10, rounds=6)
TINY = Plan("tiny", (64,), (0, 64), (8,), (40,), (8,), repeats=1, rounds=1)


class FullWidth:
    """The measurements of one layout, each of which adds its rows and hands the record on."""

    def __init__(
        self,
        parallel: ParallelConfig,
        plan: Plan,
        *,
        weights: str,
        layers: int,
        say: Callable[[str], None],
        save: Callable[[dict[str, Any]], None],
        deadline: float,
    ):
        """
        Args:
          weights: a key of `MAKERS`.
          layers: at most so many.
          say, save: progress; the record, after every row.
          deadline: of `time.monotonic`, after which nothing new begins.
        """
        self.plan, self._say, self._save, self._deadline = plan, say, save, deadline
        began, tiny = time.monotonic(), plan.size == "tiny"
        groups, block_size = parallel.attention_data, model_config(2, plan.size).index_block_size
        longest = max(max(plan.chunks) + max(plan.prefixes), max(plan.contexts) + 1)
        width = -(-longest // block_size)
        most = -(-max(plan.batches) // groups) * (-(-(max(plan.contexts) + 1) // block_size))
        stats = jax.devices()[0].memory_stats()
        memory = (1 << 40) if stats is None else stats["bytes_limit"] - stats["bytes_in_use"]
        fit = layers_and_pages(
            parallel,
            memory,
            reserve=0 if tiny else _RESERVE,
            least_pages=max(width, most // 4),
            most_pages=max(width, most),
            most_layers=layers,
            itemsize=ITEMSIZES[weights],
            size=plan.size,
        )
        self.record: dict[str, Any] = {
            "layers": fit.layers,
            "of_layers": M3_LAYERS,
            "weights": weights,
            "weight_bytes": fit.weight_bytes,
            "cache_bytes": fit.cache_bytes,
            "pages": fit.pages,
            "pages_wanted": most,
            "memory": memory,
            "compiled": 0,
            "left_out": [],
        }
        say(
            f"{fit.layers} of {M3_LAYERS} layers, {fit.weight_bytes / 1e9:.1f} GB of weights and "
            f"{fit.cache_bytes / 1e9:.1f} GB of pages on each of {parallel.num_devices} devices ..."
        )
        config, dtype = model_config(fit.layers, plan.size), jnp.float32 if tiny else jnp.bfloat16
        ranks = Ranks(config, parallel)
        state = MAKERS[weights](config, ranks, dtype)
        rows = tuple(sorted({1, *(-(-batch // groups) for batch in plan.batches)}))
        self.model = MeshModel(config, ranks, state, pages=fit.pages, rows=rows, width=width, dtype=dtype)
        jax.block_until_ready((state, self.model.pool.caches))
        self.record["model_s"] = time.monotonic() - began
        self._wholes = Executables(self.model, self._compiled_one)

    def run(self) -> dict[str, Any]:
        """Everything, what matters most first."""
        plan = self.plan
        decode = [Case("decode", size, past) for past in plan.contexts for size in plan.batches]
        prefill = [Case("prefill", size, past) for past in plan.prefixes for size in plan.chunks]
        first, rest = [decode[0], prefill[0]], [*decode[1:], *prefill[1:]]
        with self._wholes:
            self._wholes.begin([*first, *rest])
            self._measure("steps", first, self._wholes)
            self._shares(first)
            self._measure("steps", rest, self._wholes)
            self._shares([case for case in (decode[-1], prefill[-1]) if case not in first])
            self._segments(prefill)
        parallel = self.model.ranks.layout.parallel
        if parallel.attention_data > 1:
            self._spread("all_to_all", prefill, all_to_all_tokens=1)
        if parallel.tensor > 1:
            batches = [case for case in decode if case.size in plan.split]
            self._spread("shared_out_index_keys", batches, split_index_keys=True, all_to_all_tokens=None)
        return self.record

    def _measure(self, part: str, cases: Sequence[Case], wholes: Executables) -> None:
        for case in cases:
            if (whole := self._ready(f"{part}: {case}", wholes, case)) is None:
                continue
            times = self._time({"whole": whole}, case)["whole"]
            each = times["step_us"] / self.record["layers"]
            self._add(part, case, {**times, "layer_us": each, "all_layers_ms": each * M3_LAYERS / 1e3})
            shown = f"{times['step_us'] / 1e3:.2f} ms, {each:.0f} us a layer"
            self._say(f"  {part}: {case}: {shown}, {each * M3_LAYERS / 1e3:.1f} ms for {M3_LAYERS} such layers")

    def _shares(self, cases: Sequence[Case]) -> None:
        for case in cases:
            if (whole := self._ready(f"collectives: {case}", self._wholes, case)) is None:
                continue
            share = collective_share(profile(whole))
            self._add("collectives", case, {"found": share is not None, **(share or {})})
            shown = f"{share['share']:.1%}, {share['count']} of them" if share else "the profile shows no kernels"
            self._say(f"  collectives: {case}: {shown}")

    def _segments(self, cases: Sequence[Case]) -> None:
        """Layers only, as segments and whole; then how long it takes to capture them again in another pool."""
        made: dict[int, SegmentedPrefill] = {}
        for case in cases:
            if (whole := self._ready(f"segments: {case}", self._wholes, case)) is None:
                continue
            steps = self.model.steps_of(case)
            bucket = max(len(step.tokens) for step in steps)
            if bucket not in made:
                made[bucket] = self.model.segments(bucket)
            run = functools.partial(self.model.run_segments, made[bucket], steps)
            times = self._time({"segmented": run, "whole": whole.run_layers}, case)
            ratio = times["segmented"]["step_us"] / times["whole"]["step_us"]
            self._add("segments", case, {**times, "ratio": ratio})
            self._say(f"  segments: {case}: {ratio:.3f} times the whole")
        self.record["compiled"] += sum(segments.layers.stats().executables for segments in made.values())
        if not made or self._late("resize"):
            return
        bucket, segments = next(iter(made.items()))
        case = next(case for case in cases if case.size >= bucket)
        seconds = []
        for _ in range(3):
            began = time.monotonic()
            self.model.pool.resize(self.model.pool.num_pages, keep=False)
            resized = time.monotonic()
            for _ in range(2):  # warm-up, then capture; on the host nothing is compiled
                self.model.run_segments(segments, self.model.steps_of(case))
            seconds.append((resized - began, time.monotonic() - resized))
            jax.block_until_ready(self.model.pool.caches)
        self.model.fill(self.model.pool)
        resize_s, recapture_s = (statistics.median(own) for own in zip(*seconds, strict=True))
        self.record["resize"] = {"resize_ms": resize_s * 1e3, "recapture_ms": recapture_s * 1e3}
        self._save(self.record)
        self._say(f"  resized in {resize_s * 1e3:.1f} ms, captured again in {recapture_s * 1e3:.1f} ms")

    def _spread(self, part: str, cases: Sequence[Case], **changes: Any) -> None:
        """The same steps in a layout with other options."""
        if self._late(part):
            return
        self.model = self.model.spread(**changes)
        with Executables(self.model, self._compiled_one) as wholes:
            wholes.begin(cases)
            self._measure(part, cases, wholes)

    def _compiled_one(self, case: Case, seconds: float) -> None:
        self.record["compiled"] += 1
        self._say(f"  compiled {case.kind} {case.size} in {seconds:.0f} s")

    def _ready(self, what: str, wholes: Executables, case: Case) -> WholeStep | None:
        """The step, or None where it is not compiled in time."""
        try:
            return wholes.get(case, self._deadline - time.monotonic())
        except TimeoutError:
            self._leave_out(what)
            return None

    def _late(self, what: str) -> bool:
        if time.monotonic() < self._deadline:
            return False
        self._leave_out(what)
        return True

    def _leave_out(self, what: str) -> None:
        self.record["left_out"].append(what)
        self._save(self.record)

    def _time(self, ways: Mapping[str, Callable[[], jax.Array]], case: Case) -> dict[str, dict[str, float]]:
        if case.kind == "decode":
            return time_steps(ways, self.plan.repeats, self.plan.rounds)
        return time_steps(ways, max(1, self.plan.repeats // 5), max(1, self.plan.rounds // 2))  # long steps

    def _add(self, part: str, case: Case, values: Mapping[str, Any]) -> None:
        self.record.setdefault(part, []).append({**dataclasses.asdict(case), **values})
        self._save(self.record)


class Executables(contextlib.AbstractContextManager):
    """Whole steps, compiled on other threads meanwhile; those that differ in context alone share an executable."""

    def __init__(self, model: MeshModel, compiled: Callable[[Case, float], None]):
        """
        Args:
          compiled: told about each, with the seconds that it took.
        """
        self._model, self._compiled = model, compiled
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS)
        self._made: dict[tuple[str, int], concurrent.futures.Future[WholeStep]] = {}

    def begin(self, cases: Iterable[Case]) -> None:
        """Begins to compile what these need, in their order."""
        for case in cases:
            if (case.kind, case.size) not in self._made:
                self._made[case.kind, case.size] = self._threads.submit(self._make, case)

    def get(self, case: Case, seconds: float) -> WholeStep:
        """A step that was begun, when it is ready.

        Raises:
          TimeoutError: if it is not in so many seconds, or if there are none.
        """
        if seconds <= 0:
            raise TimeoutError
        made = self._made[case.kind, case.size].result(seconds)
        return made if made.case == case else made.after(case.past)

    def __exit__(self, *_: object) -> None:
        """Does not wait for what is being compiled: that has no limit."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _make(self, case: Case) -> WholeStep:
        began = time.monotonic()
        step = self._model.compiled(case)
        self._compiled(case, time.monotonic() - began)
        return step
