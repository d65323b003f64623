"""Runs the cases of `minimax-jax bench rank-slice` and writes what they gave, after each one."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from minimax_jax.cache import cache_dtype
from minimax_jax.engine.engine_config import DecodeConfig
from minimax_jax.parallel import Layout, ParallelConfig, ParallelError
from minimax_jax.parallel.config import EXPERTS
from minimax_jax.rank_slice.cases import (
    DECODE,
    PREFILL,
    TARGETS,
    Case,
    Launching,
    launchings,
    select_cases,
    slice_config,
    waves,
)
from minimax_jax.rank_slice.ceilings import Ceilings, measure_ceilings
from minimax_jax.rank_slice.kernel_classes import class_times, kernel_table
from minimax_jax.rank_slice.report import draw, table
from minimax_jax.rank_slice.slice_engine import SliceEngine
from minimax_jax.rank_slice.trace import overlap, profile, typical_lengths
from minimax_jax.rank_slice.weights import draw_weights, routing_load, weight_structs
from minimax_jax.rank_slice.work import step_work, whole
from minimax_kernels import Mxfp8

OK, FAILED = 0, 1
_WARM_UP = 3  # steps before anything counts: compilation, capture, the first replay
_PROFILED = {DECODE: 5, PREFILL: 3}  # odd: each kernel's median over them counts
_STEPS = {DECODE: 30, PREFILL: 2}  # in a row, of which the wall time is taken
_ROUNDS = 3
_COMPILING_SHARE = 0.75  # of the time that is left, the most that a group of cases may compile for


def run_rank_slice(args: argparse.Namespace) -> int:
    """Runs the subcommand and returns the exit code: `FAILED` if a case failed or was left out.

    Raises:
      ValueError: for sizes that cannot be, or that the device has no memory for.
    """
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:5.0f} s] {text}", file=sys.stderr, flush=True)

    config = slice_config(args.layers, tiny=args.tiny)
    parallel = ParallelConfig(tensor=args.tp, expert=args.ep)
    parallel.check(config, parallel.num_devices)
    if args.rank >= parallel.num_devices:
        raise ParallelError(f"--rank = {args.rank}: must be within 0..{parallel.num_devices - 1}")
    layout = Layout(config, parallel)
    cases = select_cases(args.batch, args.context, args.chunk, args.prefix, args.only)
    longest = max(case.context + case.query_len for case in cases)
    if longest >= config.max_position_embeddings:
        raise ValueError(f"--context, --prefix: {longest} tokens: must be less than {config.max_position_embeddings}")
    args.out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0]
    dtype = jnp.dtype(jnp.float32 if device.platform == "cpu" else jnp.bfloat16)
    structs = weight_structs(layout, args.weights, dtype)
    weight_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(structs))
    _require_memory(device, weight_bytes)

    say(f"{device.device_kind}: measuring copy bandwidth and matmul rate")
    ceilings = measure_ceilings(1 << 24, 256) if args.tiny else measure_ceilings()
    say(f"{ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, {ceilings.matmul_flop_per_s / 1e12:.0f} TFLOP/s")
    say(f"drawing {weight_bytes / 1e9:.1f} GB of weights")
    start = time.perf_counter()
    state = jax.block_until_ready(draw_weights(config, structs, args.routing, args.seed))
    drawn = time.perf_counter() - start
    built_peak = _memory(device, "peak_bytes_in_use")
    say(f"drawn in {drawn:.1f} s; filling pages")
    place = layout.place(EXPERTS, args.rank)
    held = range(place * layout.experts_per_rank, (place + 1) * layout.experts_per_rank)
    load = routing_load(config, state, held)

    ways = launchings(args.launch_steps or (1, DecodeConfig().steps_on(device.platform)), device.platform)
    most_steps = 2 * _PROFILED[DECODE] + max((_WARM_UP + _ROUNDS * _launches(way)) * way.steps for way in ways)
    engine = SliceEngine(
        layout, args.rank, state, cases, dtype=dtype, cache_dtype=cache_dtype(args.cache_dtype, dtype),
        most_steps=most_steps, seed=args.seed,
    )  # fmt: skip
    del state
    pool_bytes = engine.pool.num_pages * engine.page_bytes
    say(f"{pool_bytes / 1e9:.1f} GB of pages filled")
    report: dict[str, Any] = {
        "setting": _setting(args, device, dtype),
        "ceilings": dataclasses.asdict(ceilings),
        "weights": {
            "bytes": weight_bytes,
            "seconds": drawn,
            "peak_bytes": built_peak,
            "largest_in_bfloat16": max(
                (2 * x.values.size for x in structs.values() if isinstance(x, Mxfp8)), default=None
            ),
        },
        "pool_bytes": pool_bytes,
        "compile_seconds": 0.0,
        "routing": {
            "share_of_rank": {layer: sum(shares) for layer, shares in load.items()},
            "share_of_its_busiest_expert": {layer: max(shares) for layer, shares in load.items()},
        },
        "cases": [],
        "failed": {},
        "left_out": [],
    }
    deadline = begun + args.limit_s
    for wave in waves(cases):
        compiled: dict[tuple[Case, Launching], dict[str, Any]] = {}
        left = deadline - time.monotonic()
        if wave[0].kind == DECODE and left > 0:
            say(f"compiling {len(wave) * len(ways)} decode steps, for {_COMPILING_SHARE * left:.0f} s at most")
            start = time.perf_counter()
            compiled = engine.compile(wave, ways, say, seconds=_COMPILING_SHARE * left)
            report["compile_seconds"] += time.perf_counter() - start
        for case in wave:
            late = time.monotonic() > deadline
            own = {way: compiled[case, way] for way in ways if (case, way) in compiled}
            if late or (case.kind == DECODE and not own):
                report["left_out"].append(case.name)
                say(f"{case.name}: left out, --limit-s {args.limit_s} " + ("is over" if late else "leaves no time"))
                continue
            found: dict[str, Any] = {"compiling_beside": engine.compiling}
            usable = [way for way, of in own.items() if "error" not in of]
            refused = {way.name: of["error"] for way, of in own.items() if "error" in of}
            if case.kind == DECODE and not usable:
                found["error"] = "; ".join(refused.values())
            else:
                try:
                    found |= _measure(engine, case, usable, layout, ceilings, args, load) | {"refused": refused}
                except jax.errors.JaxRuntimeError as error:  # want of memory, as a rule
                    found["error"] = " ".join(str(error).split())[:500]
                    engine.recover()
            if usable:
                found |= {name: most(own[way][name] for way in usable) for name in ("temporaries", "float_copies")}
            if "error" in found:
                report["failed"][case.name] = found["error"]
                _write(report, args.out)
                say(f"{case.name}: FAILED: {found['error']}")
                continue
            report["cases"].append(found)
            report["peak_bytes"] = _memory(device, "peak_bytes_in_use")  # of the whole run until now
            report["seconds"] = time.monotonic() - begun
            _write(report, args.out)
            say(f"{case.name}: {found['step_ms']:.2f} ms, {found['times_floor']:.2f} x floor")
    engine.pool.release()
    _write(report, args.out)
    print(table(report))
    drawn_to = draw(report, args.out / "rank_slice.png")
    picture = f", {drawn_to}" if drawn_to else " (no picture: matplotlib is not installed)"
    print(f"{args.out / 'rank_slice.json'}{picture}")
    if engine.compiling:
        say(f"results are written; waiting for {engine.compiling} compilations, which cannot be stopped")
    return FAILED if report["failed"] or report["left_out"] else OK


def _measure(
    engine: SliceEngine,
    case: Case,
    ways: list[Launching],
    layout: Layout,
    ceilings: Ceilings,
    args: argparse.Namespace,
    load: dict[int, list[float]],
) -> dict[str, Any]:
    """Times one case, decode steps in each way of launching them, then profiles some of its steps."""
    layers, bad = layout.config.num_hidden_layers, engine.bad_steps
    timed: list[dict[str, Any]] = []
    for way in ways if case.kind == DECODE else [Launching(1, True)]:
        engine.programs.launching = way
        requests, number = engine.requests(case), _STEPS[PREFILL] if case.kind == PREFILL else _launches(way)
        start = time.perf_counter()
        engine.run(requests, _WARM_UP, way.steps)
        first = time.perf_counter() - start
        walls = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            engine.run(requests, number, way.steps)
            walls.append((time.perf_counter() - start) / (number * way.steps))
        seconds = statistics.median(walls)
        spread = (max(walls) - min(walls)) / seconds
        timed.append({**dataclasses.asdict(way), "step_ms": seconds * 1e3, "spread": spread, "warm_up_s": first})
    best = min(timed, key=lambda one: one["step_ms"])
    seconds = best["step_ms"] / 1e3
    engine.programs.launching = next((way for way in ways if way.steps == 1), Launching(1, True))
    requests = engine.requests(case)
    engine.run(requests, 1)
    count = _PROFILED[case.kind]
    seen_launches = profile(lambda: engine.run(requests, count))
    seen, launches = overlap(seen_launches), typical_lengths(seen_launches, count)
    parts = step_work(layout, case, weights=args.weights, experts_load=load, cache_itemsize=engine.cache_itemsize)
    total = whole(parts)
    floor = total.seconds(ceilings)
    times = {name: us / count for name, us in class_times(launches).items()}
    busy = None if seen is None else sum(times.values()) - seen.overlapped_us / count
    target = TARGETS.get(case) if _comparable(layout, args) else None
    return {
        "case": case.name,
        **dataclasses.asdict(case),
        **{name: best[name] for name in ("step_ms", "spread", "warm_up_s")},
        "launchings": timed if case.kind == DECODE else [],
        "layer_us": seconds / layers * 1e6,
        "floor_ms": floor * 1e3,
        "times_floor": seconds / floor,
        "flops": total.flops,
        "bytes": total.bytes,
        "mfu": total.flops / seconds / ceilings.matmul_flop_per_s,
        "bandwidth_share": total.bytes / seconds / ceilings.copy_bytes_per_s,
        "target_ms": None if target is None else target.most_ms,
        "aim": None if target is None else target.aim,
        "finite": engine.bad_steps == bad,
        "distinct_pages": engine.distinct_share(case),
        "device_busy_us": busy,
        "profiled_busy_us": None if seen is None else seen.busy_us / count,  # a mean: other processes' time is in it
        "classes": {
            name: {
                "us": times.get(name),
                "floor_us": parts[name].seconds(ceilings) * 1e6 if name in parts else None,
                "flops": parts[name].flops if name in parts else None,
                "bytes": parts[name].bytes if name in parts else None,
            }
            for name in dict.fromkeys((*times, *parts))
        },
        # between kernels and around them: the wall time of a step that nobody profiles, less the time in which any ran
        "gaps_us": None if busy is None else seconds * 1e6 - busy,
        "launches_a_layer": None if seen is None else seen.kernels / count / layers,
        "kernels": kernel_table(launches, count),
        "profiled_steps": count,
    }


def most(numbers: Iterable[int | None]) -> int | None:
    """The largest of those that are known, None if none is."""
    return max((number for number in numbers if number is not None), default=None)


def _launches(way: Launching) -> int:
    """Launches in a row, of which the wall time is taken."""
    return -(-_STEPS[DECODE] // way.steps)


def _comparable(layout: Layout, args: argparse.Namespace) -> bool:
    """Whether the targets are about this slice."""
    sizes = (layout.parallel.tensor, layout.parallel.expert, layout.config.num_hidden_layers)
    return sizes == (8, 8, 60) and args.weights == "mxfp8" and not args.tiny


def _setting(args: argparse.Namespace, device: jax.Device, dtype: Any) -> dict[str, Any]:
    general = ("run", "command", "benchmark", "out", "version")
    own = {name: value for name, value in vars(args).items() if name not in general}
    return {
        **own,
        "device": device.device_kind,
        "dtype": dtype.name,
        "collectives": "local copies of the same size",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _memory(device: jax.Device, key: str) -> int | None:
    stats = device.memory_stats()
    return None if stats is None else int(stats[key])


def _require_memory(device: jax.Device, weight_bytes: int) -> None:
    limit = _memory(device, "bytes_limit")
    if limit is not None and weight_bytes > limit:
        raise ValueError(
            f"--layers, --weights: {weight_bytes / 1e9:.1f} GB of weights: must be at most {limit / 1e9:.1f} GB, what "
            "JAX has of the device"
        )


def _write(report: dict[str, Any], out: Path) -> None:
    (out / "rank_slice.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
