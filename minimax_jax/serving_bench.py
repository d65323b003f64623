"""What `minimax-jax bench` measures: latency by batch and length, throughput over many prompts."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minimax_jax.cli_parallel import joined
from minimax_jax.engine.outputs import RequestOutput
from minimax_jax.engine.sampling_params import SamplingParams
from minimax_jax.llm import LLM
from minimax_jax.parallel import ParallelConfig, Processes
from minimax_jax.prompt_lines import check_lengths, read_lines

OK = 0


@dataclasses.dataclass(frozen=True)
class Point:
    """One batch of equal requests; the median of the repeats.

    Attributes:
      seconds: from the first request to the last token.
      new_tokens_per_second: of all requests.
      first_token_ms: until a request's first token, the median over requests.
      token_ms: per token after it, likewise.
    """

    batch: int
    input_len: int
    output_len: int
    seconds: float
    new_tokens_per_second: float
    first_token_ms: float
    token_ms: float


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Many prompts at once; the median of the repeats."""

    prompts: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    requests_per_second: float
    new_tokens_per_second: float
    tokens_per_second: float


def run_bench(args: argparse.Namespace) -> int:
    """Runs the subcommand and returns the exit code.

    Raises:
      ValueError, OSError: for whatever the user can put right.
    """
    with joined(args) as (processes, parallel):
        return _run(args, parallel, processes)


def _run(args: argparse.Namespace, parallel: ParallelConfig, processes: Processes) -> int:
    longest = max(args.input_lens) + args.output_len
    lines = processes.from_first(lambda: None if args.prompt_file is None else read_lines(args.prompt_file))
    if processes.is_first:
        args.out.mkdir(parents=True, exist_ok=True)  # before the minutes that follow
    with LLM(
        args.model,
        dtype=args.dtype,
        quantization=args.quantization,
        parallel=parallel,
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        max_seq_len=longest + 1 if lines is None else None,
        cache_config={"enable_reuse": False, "dtype": args.cache_dtype},  # repeats must compute everything again
        decode_config={"steps_per_launch": args.steps_per_launch},
        progress=processes.is_first,
    ) as llm:
        if lines is not None:
            lines = lines[: args.num_prompts]
            check_lengths(llm, lines, args.output_len, args.prompt_file)
        say = _printer() if processes.is_first else _silent
        points = []
        for input_len in args.input_lens:
            for batch in args.batch_sizes:
                say(f"latency: batch {batch}, prompts of {input_len} tokens")
                points.append(measure_point(llm, batch, input_len, args.output_len, args.repeats, args.seed))
        throughput = None
        if args.num_prompts:
            if lines is None:
                prompts: list[Any] = random_prompts(llm, args.num_prompts, max(args.input_lens), args.seed)
            else:
                prompts = [text for _, text in lines]
            say(f"throughput: {len(prompts)} prompts")
            throughput = measure_throughput(llm, prompts, args.output_len, args.repeats)
        report = _report(args, parallel, llm, points, throughput)
    if processes.is_first:
        say("")
        _write(args, report, points, throughput)
    return OK


def _write(
    args: argparse.Namespace, report: dict[str, Any], points: list[Point], throughput: Throughput | None
) -> None:
    (args.out / "bench.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(points, throughput))
    drawn = _draw(points, report["device"], args.out / "bench.png")
    print(f"{args.out / 'bench.json'}{f', {drawn}' if drawn else ' (no picture: matplotlib is not installed)'}")


def random_prompts(llm: LLM, count: int, length: int, seed: int) -> list[list[int]]:
    """Token ids that are all different prompts."""
    random = np.random.default_rng(seed)
    return random.integers(0, llm.model.config.vocab_size, (count, length)).tolist()


def measure_point(llm: LLM, batch: int, input_len: int, output_len: int, repeats: int, seed: int = 0) -> Point:
    """Times a batch of random prompts, after a run that compiles."""
    prompts = random_prompts(llm, batch, input_len, seed)
    runs = _timed(lambda: _generate(llm, prompts, output_len), repeats)
    firsts, rests = [], []
    for _, outputs in runs:
        for output in outputs:
            times = output.metrics
            assert times is not None and times.first_token is not None and times.finished is not None
            firsts.append(times.first_token - times.arrival)
            rests.append((times.finished - times.first_token) / (output_len - 1))
    seconds = statistics.median(seconds for seconds, _ in runs)
    return Point(
        batch,
        input_len,
        output_len,
        seconds,
        batch * output_len / seconds,
        statistics.median(firsts) * 1e3,
        statistics.median(rests) * 1e3,
    )


def measure_throughput(llm: LLM, prompts: list[Any], output_len: int, repeats: int) -> Throughput:
    """Times prompts that all come at once, after a run that compiles."""
    runs = _timed(lambda: _generate(llm, prompts, output_len), repeats)
    seconds = statistics.median(seconds for seconds, _ in runs)
    outputs = runs[0][1]
    given = sum(len(output.prompt_token_ids) for output in outputs)
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    count = len(prompts)
    return Throughput(count, given, made, seconds, count / seconds, made / seconds, (given + made) / seconds)


def _generate(llm: LLM, prompts: list[Any], output_len: int) -> list[RequestOutput]:
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True), use_tqdm=False
    )
    for output in outputs:
        if output.error is not None:
            raise ValueError(f"a request failed: {output.error}")
    return outputs


def _timed(run: Callable[[], list[RequestOutput]], repeats: int) -> list[tuple[float, list[RequestOutput]]]:
    run()
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        outputs = run()
        runs.append((time.perf_counter() - start, outputs))
    return runs


def _report(
    args: argparse.Namespace, parallel: ParallelConfig, llm: LLM, points: list[Point], throughput: Throughput | None
) -> dict[str, Any]:
    device = llm.model.leaves[0].devices()
    return {
        "model": str(args.model),
        "device": f"{len(device)} x {next(iter(device)).device_kind}",
        "parallel": dataclasses.asdict(parallel),
        "processes": jax.process_count(),
        "dtype": llm.model.dtype.name,
        "cache_dtype": args.cache_dtype,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "max_batch_size": args.max_batch_size,
        "max_num_tokens": args.max_num_tokens,
        "steps_per_launch": args.steps_per_launch,
        "repeats": args.repeats,
        "latency": [dataclasses.asdict(point) for point in points],
        "throughput": None if throughput is None else dataclasses.asdict(throughput),
        "stats": dataclasses.asdict(llm.stats()),
    }


def table(points: list[Point], throughput: Throughput | None) -> str:
    """The results for a terminal."""
    lines = ["batch  prompt  new  first token, ms  a token, ms  new tokens/s"]
    lines += [
        f"{p.batch:5}  {p.input_len:6}  {p.output_len:3}  {p.first_token_ms:15.1f}  {p.token_ms:11.2f}  "
        f"{p.new_tokens_per_second:12.1f}"
        for p in points
    ]
    if throughput is not None:
        t = throughput
        lines.append(
            f"{t.prompts} prompts at once: {t.seconds:.2f} s, {t.requests_per_second:.2f} requests/s, "
            f"{t.new_tokens_per_second:.1f} new tokens/s, {t.tokens_per_second:.1f} tokens/s with the prompts"
        )
    return "\n".join(lines)


def _draw(points: list[Point], device: str, path: Path) -> Path | None:
    """Rate, first token and time per token over the batch, a line for each prompt length."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("new_tokens_per_second", "new tokens/s"),
        ("first_token_ms", "ms to the first token"),
        ("token_ms", "ms a token after it"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4))
    for axis, (field, label) in zip(axes, panels, strict=True):
        for length in dict.fromkeys(point.input_len for point in points):
            own = sorted((point for point in points if point.input_len == length), key=lambda point: point.batch)
            axis.plot([p.batch for p in own], [getattr(p, field) for p in own], "o-", label=f"prompts of {length}")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("batch")
        axis.set_title(label, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.suptitle(device, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return path


def _silent(text: str) -> None:
    """Of the processes that do not print."""


def _printer() -> Callable[[str], None]:
    """Progress on one line of a terminal, on lines of its own elsewhere."""
    if sys.stderr.isatty():
        return lambda text: print(f"\x1b[K{text}", end="\r", file=sys.stderr, flush=True)
    return lambda text: print(text, file=sys.stderr, flush=True) if text else None
