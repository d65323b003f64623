"""Does the pool fill the memory that it was given, and does the fullest run stay within it?"""

from __future__ import annotations

import gc
import time
from typing import Any

import jax
import numpy as np

from benchmarks.engine.rank_llm import rank_llm
from minimax_jax import SamplingParams

TOLERANCE = 0.02


def measure_sizing(layers: int, *, fraction: float, tiny: bool) -> dict[str, Any]:
    """Builds an engine, then runs full batches of sequences of full length.

    Returns:
      "limit", "used" and "peak" in bytes of the device; "filled": (peak of the run) / limit; "fine": within 2 % of the
      fraction, and nothing ran out of memory. On a device that tells no memory only the run itself.
    """
    batch, length, tokens = (4, 64, 64) if tiny else (64, 8192, 8192)
    start = time.perf_counter()
    llm = rank_llm(
        layers,
        moe=False,
        tiny=tiny,
        max_batch_size=batch,
        max_num_tokens=tokens,
        max_seq_len=length,
        segment_config={"buckets": (tokens,)},
        decode_config={"batch_sizes": (batch,), "page_buckets": (length // (16 if tiny else 128),)},
        cache_config={"free_memory_fraction": fraction},
        warm_up=True,
    )
    built = time.perf_counter() - start
    device = jax.devices()[0]
    before = device.memory_stats() or {}
    with llm:
        prompts = np.random.default_rng(0).integers(0, llm.model.config.vocab_size, (batch, length - 8)).tolist()
        start = time.perf_counter()
        outputs = llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
        seconds = time.perf_counter() - start
        stats = llm.stats()
    after = device.memory_stats() or {}
    errors = [str(output.error) for output in outputs if output.error is not None]
    result: dict[str, Any] = {
        "fraction": fraction,
        "pages": stats.num_pages,
        "build_s": built,
        "run_s": seconds,
        "errors": errors,
        "steps": stats.steps,
        "fine": not errors and stats.failed_steps == 0,
    }
    if after:
        filled = after["peak_bytes_in_use"] / after["bytes_limit"]
        result |= {
            "limit": after["bytes_limit"],
            "used": before["bytes_in_use"],
            "peak": after["peak_bytes_in_use"],
            "filled": filled,
        }
        result["fine"] &= abs(filled - fraction) <= TOLERANCE
    del llm
    gc.collect()
    return result
