"""The parts of the benchmark of segments, and their order."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.segments.rank_model import RankModel, Sizes, rank_config
from benchmarks.segments.report import summary, write_results
from benchmarks.segments.stopwatch import bytes_in_use, host_times, time_steps
from benchmarks.segments.timeline import timeline_svg
from minimax_jax.attention import PagedAttention
from minimax_jax.engine.segmented_prefill import FlatStep
from minimax_jax.rank_slice.trace import Launch, overlap, profile
from minimax_jax.segmented.graphs import dump_options, graph_use

FULL = Sizes(layers=8, prefill=(1024, 2048, 4096, 8192), decode=(1, 64), past=8192, repeats=20, rounds=15)
TINY = Sizes(layers=3, prefill=(64, 128), decode=(1, 4), past=64, repeats=2, rounds=2)
OFF = {"xla_gpu_enable_command_buffer": ""}
# what decides how kernels inside a graph wait for each other, and whether there is a graph at all
VARIANTS: dict[str, dict[str, Any]] = {
    "graphs off": OFF,
    "min size 1": {"xla_gpu_graph_min_graph_size": 1},
    "concurrent": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT"},
    "concurrent regions": {"xla_gpu_command_buffer_scheduling_mode": "CONCURRENT_REGIONS"},
    "serialize": {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"},
}


@dataclasses.dataclass
class Bench:
    """What the parts share: the model, sizes, and what they found."""

    model: RankModel
    sizes: Sizes
    out: Path
    impl: str | None
    tiny: bool
    results: dict[str, Any] = dataclasses.field(default_factory=dict)
    made: dict[tuple[str, int], Any] = dataclasses.field(default_factory=dict)

    def prefill_step(self, tokens: int) -> FlatStep:
        """One request's chunk after a long prefix."""
        return self.model.step(1, tokens, self.sizes.past)

    def decode_step(self, requests: int) -> FlatStep:
        """One token for each request."""
        return self.model.step(requests, 1, self.sizes.past)

    def prepare(self, steps: Mapping[tuple[str, int], FlatStep]) -> None:
        """Builds segments and whole executables for steps, whole ones on other threads meanwhile."""
        missing = {key: step for key, step in steps.items() if key not in self.made}
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            wholes = {
                key: threads.submit(compiled_whole, self.model, f"whole_{key[0]}_{key[1]}", step)
                for key, step in missing.items()
            }
            for key, step in missing.items():
                segments = self.model.segments(len(step.tokens))
                for _ in range(2):
                    jax.block_until_ready(self.model.run_segments(segments, step))
                self.made[key] = (segments, wholes[key].result(), step)

    def ways(self, key: tuple[str, int]) -> dict[str, Callable[[], jax.Array]]:
        """The prepared ways to run a step."""
        segments, whole, step = self.made[key]
        return {
            "segmented": lambda: self.model.run_segments(segments, step),
            "whole": lambda: self.model.run_whole(whole, step),
        }


def compiled_whole(model: RankModel, label: str, step: FlatStep, options: Mapping[str, Any] | None = None) -> Any:
    """The whole step, compiled for this step's shapes."""
    return model.whole(label, options).lower(*model.whole_arguments(step)).compile()


def part_prefill(bench: Bench) -> None:
    """Step times and host times at every prefill size."""
    sizes = bench.sizes
    bench.prepare({("prefill", n): bench.prefill_step(n) for n in sizes.prefill})
    found = bench.results["prefill"] = []
    for tokens in sizes.prefill:
        ways = bench.ways(("prefill", tokens))
        times = time_steps(ways, sizes.repeats, sizes.rounds)
        segments = bench.made["prefill", tokens][0]
        host = host_times(ways["segmented"], segments.layers, sizes.repeats)
        built = segments.layers.stats()
        ratio = times["segmented"]["step_us"] / times["whole"]["step_us"]
        found.append({"tokens": tokens, **times, "ratio": ratio, **host, "compile_s": built.compile_seconds})
    segments = bench.made["prefill", sizes.prefill[0]][0].layers
    (bench.out / "explain.txt").write_text(segments.explain() + "\n", encoding="utf-8")
    (bench.out / "split.svg").write_text(segments.picture(), encoding="utf-8")


def part_decode(bench: Bench) -> None:
    """Decode steps as one executable and as segments."""
    bench.prepare({("decode", n): bench.decode_step(n) for n in bench.sizes.decode})
    found = bench.results["decode"] = []
    for requests in bench.sizes.decode:
        ways = bench.ways(("decode", requests))
        times = time_steps(ways, bench.sizes.repeats, bench.sizes.rounds)
        host = host_times(ways["segmented"], bench.made["decode", requests][0].layers, bench.sizes.repeats)
        ratio = times["segmented"]["step_us"] / times["whole"]["step_us"]
        found.append({"requests": requests, **times, "ratio": ratio, **host})


def part_memory(bench: Bench) -> None:
    """Bytes in use before a pool, with it captured, and after its release; and the time to capture again."""
    step = bench.prefill_step(bench.sizes.prefill[0])
    bench.prepare({("prefill", bench.sizes.prefill[0]): step})
    segments = bench.made["prefill", bench.sizes.prefill[0]][0]
    old = bench.model.pool
    old.release()
    before = bytes_in_use()
    bench.model.pool = bench.model.new_pool()
    for _ in range(3):
        jax.block_until_ready(bench.model.run_segments(segments, step))
    during = bytes_in_use()
    bench.model.pool.release()
    after = bytes_in_use()
    bench.model.pool = bench.model.new_pool()
    seconds = []
    for _ in range(5):
        bench.model.pool.resize(bench.model.num_pages, keep=False)
        start = time.perf_counter()
        for _ in range(2):
            bench.model.run_segments(segments, step)
        seconds.append(time.perf_counter() - start)  # of the host: warm-up and capture, nothing compiled
        jax.block_until_ready(bench.model.pool.caches)
    bench.results["memory"] = {
        "before": before,
        "captured": during,
        "released": after,
        "recapture_ms": statistics.median(seconds) * 1e3,
    }


def part_graphs(bench: Bench) -> None:
    """Graphs off, other graph options: a small and a larger step through segments, and a decode step as a whole."""
    sizes, model = bench.sizes, bench.model
    shapes = {"decode": bench.decode_step(sizes.decode[-1]), "prefill": bench.prefill_step(sizes.prefill[0])}
    bench.prepare({("decode", sizes.decode[-1]): shapes["decode"], ("prefill", sizes.prefill[0]): shapes["prefill"]})
    found = bench.results["graphs"] = {}
    for name, step in shapes.items():
        ways = {f"{way}, default": run for way, run in bench.ways((name, len(step.tokens))).items()}
        for variant in ("graphs off", "min size 1"):
            options = VARIANTS[variant]
            whole = compiled_whole(model, f"whole_{name}_{variant.replace(' ', '_')}", step, options)
            attention = PagedAttention(model.config, impl=bench.impl, compiler_options=options)
            segments = model.segments(len(step.tokens), attention=attention, compiler_options=options)
            ways[f"whole, {variant}"] = lambda whole=whole, step=step: model.run_whole(whole, step)
            ways[f"segmented, {variant}"] = lambda s=segments, step=step: model.run_segments(s, step)
        found[name] = time_steps(ways, sizes.repeats, sizes.rounds)


def part_launches(bench: Bench) -> None:
    """What XLA's dumps say lies in graphs: segments, the attention behind the boundary, a whole decode step."""
    model, sizes = bench.model, bench.sizes
    step, decode = bench.prefill_step(sizes.prefill[0]), bench.decode_step(sizes.decode[-1])
    with tempfile.TemporaryDirectory() as directory:
        dumps = Path(directory)
        options = dump_options(dumps)
        attention = PagedAttention(model.config, impl=bench.impl, compiler_options=options)
        segments = model.segments(len(step.tokens), attention=attention, dump_to=dumps)
        for _ in range(2):
            jax.block_until_ready(model.run_segments(segments, step))
        compiled_whole(model, "whole_dumped", decode, options)
        uses = {f"segment {name}": use for name, use in segments.layers.graphs().items()}
        for module in ("_dense_layer", "_sparse_layer", "whole_dumped"):
            if (use := graph_use(dumps, module)) is not None:
                uses[module.strip("_")] = use
        if uses:  # with the launches, where there are any
            (bench.out / "explain.txt").write_text(segments.layers.explain() + "\n", encoding="utf-8")
        files = [f for f in sorted(dumps.iterdir()) if "thunk_sequence" in f.name]
        text = "\n\n".join(f"== {f.name}\n{f.read_text(encoding='utf-8')}" for f in files)
        names = sorted({f.name.split(".", 1)[-1] for f in dumps.iterdir()})
        (bench.out / "launches.txt").write_text(text or "no launches dumped; files:\n" + "\n".join(names), "utf-8")
        bench.results["launches"] = {name: dataclasses.asdict(use) for name, use in uses.items()}


def part_overlap(bench: Bench) -> None:
    """Kernels on the time axis: segments and the whole, with graphs as they are and as the profiler wants them."""
    model, tokens = bench.model, bench.sizes.prefill[0]
    step = bench.prefill_step(tokens)
    bench.prepare({("prefill", tokens): step})
    found: dict[str, list[Launch]] = {name: profile(run) for name, run in bench.ways(("prefill", tokens)).items()}
    # by default XLA runs without graphs while it is profiled
    shown = {"xla_enable_command_buffers_during_profiling": True}
    for variant, more in (("graphs kept", {}), ("graphs kept, concurrent", VARIANTS["concurrent"])):
        attention = PagedAttention(model.config, impl=bench.impl, compiler_options={**shown, **more})
        segments = model.segments(tokens, attention=attention, compiler_options={**shown, **more})
        for _ in range(3):
            jax.block_until_ready(model.run_segments(segments, step))
        found[f"segmented, {variant}"] = profile(lambda s=segments: model.run_segments(s, step))
    (bench.out / "timeline.svg").write_text(timeline_svg(found), encoding="utf-8")
    bench.results["overlap"] = {
        name: dataclasses.asdict(seen) if (seen := overlap(launches)) else None for name, launches in found.items()
    }


def part_branches(bench: Bench) -> None:
    """Do independent branches gain from other schedules: shared beside routed experts, index beside QKV projections."""
    config = rank_config(3, moe=True, tiny=bench.tiny)
    tokens = bench.sizes.prefill[0] if bench.tiny else 256
    model = RankModel(config, bench.sizes.pages(config.index_block_size), dtype=bench.model.dtype, impl=bench.impl)
    step = model.step(1, tokens, bench.sizes.past)
    ways: dict[str, Callable[[], jax.Array]] = {}
    refused = {}
    for name, options in {"default": {}, **VARIANTS}.items():
        segments = model.segments(tokens, compiler_options=options)
        try:
            jax.block_until_ready(model.run_segments(segments, step))
        except jax.errors.JaxRuntimeError as error:
            refused[name] = str(error).splitlines()[0]
            continue
        ways[name] = lambda s=segments: model.run_segments(s, step)
    bench.results["branches"] = {
        "tokens": tokens,
        "times": time_steps(ways, bench.sizes.repeats, bench.sizes.rounds),
        "refused": refused,
    }
    launches = profile(ways["default"])
    seen = overlap(launches)
    bench.results["branches"]["overlap"] = dataclasses.asdict(seen) if seen else None


PARTS: dict[str, Callable[[Bench], None]] = {
    "prefill": part_prefill,
    "decode": part_decode,
    "memory": part_memory,
    "launches": part_launches,
    "overlap": part_overlap,
    "graphs": part_graphs,
    "branches": part_branches,
}


def run_parts(parts: Sequence[str], out: Path, *, layers: int, impl: str | None, tiny: bool, deadline: float) -> str:
    """Runs parts in order until the deadline, writing results after each; returns the table."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    sizes = dataclasses.replace(TINY if tiny else FULL, layers=min(layers, TINY.layers) if tiny else layers)
    config = rank_config(sizes.layers, moe=False, tiny=tiny)
    dtype = jnp.float32 if tiny else jnp.bfloat16
    begun = time.monotonic()
    model = RankModel(config, sizes.pages(config.index_block_size), dtype=dtype, impl=impl)
    bench = Bench(model, sizes, out, impl, tiny)
    device = jax.devices()[0]
    bench.results["setting"] = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "layers": sizes.layers,
        "hidden": config.hidden_size,
        "dtype": np.dtype(dtype).name,
        "past": sizes.past,
        "pool_bytes": sum(c.nbytes for c in jax.tree.leaves(model.pool.caches)),
    }
    seconds = bench.results["seconds"] = {"model": time.monotonic() - begun}
    bench.results["left_out"] = []
    for name in parts:
        if time.monotonic() > deadline:
            bench.results["left_out"].append(name)
            continue
        begun = time.monotonic()
        print(f"{name} ...", flush=True)
        PARTS[name](bench)
        seconds[name] = time.monotonic() - begun
        write_results(bench.results, out)
    write_results(bench.results, out)
    return summary(bench.results)
