"""Random requests through `LLM` over a mesh for some minutes: none may be lost, and memory must stay flat."""

from __future__ import annotations

import concurrent.futures
import resource
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.multi_gpu.weights import MAKERS, model_config
from minimax_jax import LLM, MiniMaxM3ForCausalLM, SamplingParams
from minimax_jax.parallel import ParallelConfig, Ranks

_CALLERS, _TOGETHER = 4, 16  # threads that call `generate`, and prompts of a call at most
_DRAIN = 10.0  # seconds for the last answers
# bytes by which use may grow from the first third to the last
_DEVICE_GROWTH, _HOST_GROWTH = 64 << 20, 256 << 20


def serve_random(
    parallel: ParallelConfig,
    *,
    seconds: float,
    deadline: float,
    layers: int,
    weights: str,
    tiny: bool,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Several threads ask without a pause; every answer must have the length that was asked for.

    Args:
      deadline: of `time.monotonic`; what is asked for must be answered by then, so the last seconds ask for nothing.

    Returns:
      "requests", "lost" (with the first few "errors"), "tokens_per_s", "steps"; "device_bytes" and "host_bytes" over
      time; "flat": whether their last third's medians are the first's but for 64 MiB (device), 256 (host); "fine".
    """
    config, dtype = model_config(layers, "tiny" if tiny else "full"), jnp.float32 if tiny else jnp.bfloat16
    ranks = Ranks(config, parallel)
    began = time.monotonic()
    model = MiniMaxM3ForCausalLM(config, MAKERS[weights](config, ranks, dtype), ranks=ranks)
    longest, prompt, tokens, batch = (64, 40, 32, 4) if tiny else (4096, 3000, 2048, 64)
    width = longest // config.index_block_size
    llm = LLM(
        model,
        max_batch_size=batch,
        max_num_tokens=tokens,
        max_seq_len=longest,
        segment_config={"buckets": (tokens,)},
        decode_config={"batch_sizes": (batch,), "page_buckets": (width,)},
        cache_config={"page_size": config.index_block_size, "max_tokens": batch * longest // 2},
        warm_up=True,
    )
    with llm:
        record: dict[str, Any] = {"layers": layers, "build_s": time.monotonic() - began, "compiled": llm.stats().traces}
        say(f"  {layers} layers serve after {record['build_s']:.0f} s")
        counts = _Counts()
        start = time.monotonic()
        stop = min(start + seconds, max(deadline - _DRAIN, start + 1))
        samples: list[tuple[float, int | None, int]] = []
        with concurrent.futures.ThreadPoolExecutor(_CALLERS) as callers:
            asking = [callers.submit(_ask, llm, seed, prompt, longest, stop, counts) for seed in range(_CALLERS)]
            while not all(future.done() for future in asking):
                concurrent.futures.wait(asking, timeout=0.5 if tiny else 2.0)
                samples.append((time.monotonic() - start, _device_bytes(), _host_bytes()))
                if len(samples) % 10 == 0:
                    say(f"  {counts.requests} requests, {counts.lost} lost")
                    save({**record, **counts.record(time.monotonic() - start)})
            for future in asking:
                future.result()
        stats = llm.stats()
    flat = _flat([used for _, used, _ in samples], _DEVICE_GROWTH) and _flat(
        [used for *_, used in samples], _HOST_GROWTH
    )
    record |= counts.record(time.monotonic() - start)
    record |= {
        "steps": stats.steps,
        "failed_steps": stats.failed_steps,
        "time_s": [round(at, 1) for at, *_ in samples],
        "device_bytes": [used for _, used, _ in samples],
        "host_bytes": [used for *_, used in samples],
        "flat": flat,
        "fine": flat and counts.lost == 0 and counts.requests > 0 and stats.failed_steps == 0,
    }
    return record


class _Counts:
    """What all callers got together."""

    def __init__(self) -> None:
        self.requests = self.tokens = self.lost = 0
        self.errors: list[str] = []
        self.lock = threading.Lock()

    def add(self, outputs: list[Any], wanted: list[int]) -> None:
        with self.lock:
            for output, length in zip(outputs, wanted, strict=True):
                found = 0 if output.error is not None else len(output.outputs[0].token_ids)
                self.requests += 1
                self.tokens += found
                if found != length:
                    self.lost += 1
                    self.errors.append(f"{found} of {length} tokens: {output.error}")

    def record(self, seconds: float) -> dict[str, Any]:
        return {
            "seconds": seconds,
            "requests": self.requests,
            "lost": self.lost,
            "errors": self.errors[:5],
            "tokens_per_s": self.tokens / seconds,
        }


def _ask(llm: LLM, seed: int, prompt: int, longest: int, stop: float, counts: _Counts) -> None:
    random = np.random.default_rng(seed)
    while time.monotonic() < stop:
        count = int(random.integers(1, _TOGETHER + 1))
        lengths = random.integers(1, prompt + 1, count)
        wanted = [int(random.integers(1, min(129, longest - length))) for length in lengths]
        prompts = [random.integers(0, llm.model.config.vocab_size, length).tolist() for length in lengths]
        params = [
            SamplingParams(
                max_tokens=length, ignore_eos=True, detokenize=False, temperature=float(random.random() < 0.5)
            )
            for length in wanted
        ]
        counts.add(llm.generate(prompts, params, use_tqdm=False), wanted)


def _device_bytes() -> int | None:
    """Of the device that uses most; None where they do not tell."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max(int(own["bytes_in_use"]) for own in stats) if all(stats) else None


def _host_bytes() -> int:
    """In use by this process; where /proc is not, the most that it ever used."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _flat(samples: Sequence[int | None], growth: int) -> bool:
    """Whether the last third uses no more than the first, but for `growth`; who does not tell counts as flat."""
    told = [sample for sample in samples if sample is not None]
    third = len(told) // 3
    return not third or statistics.median(told[-third:]) <= statistics.median(told[:third]) + growth
