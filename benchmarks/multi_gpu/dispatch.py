"""The host's time for a decode step over a mesh, in one process or in several.

  python -m benchmarks.multi_gpu.dispatch --tp 8 --ep 8 --out one.json
  python scripts/launch.py --processes 8 --devices-per-process 1 -- python -m benchmarks.multi_gpu.dispatch --tp 8

M3's layers at an eighth of its width: as many arrays and kernels, so that the host is what takes time. Process 0
writes --out, and a line to standard output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from minimax_jax.cli_arguments import integer
from minimax_jax.cli_parallel import add_parallel, joined
from minimax_jax.parallel import ParallelConfig


def main() -> int:
    """Measures and reports."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.multi_gpu.dispatch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_parallel(parser)
    parser.add_argument("--layers", type=integer(2), default=16, help="of the model (default: 16)")
    parser.add_argument("--batch", type=integer(1), default=8, help="requests of a step (default: 8)")
    parser.add_argument("--steps", type=integer(1), default=50, help="to time (default: 50)")
    parser.add_argument("--tiny", action="store_true", help="small sizes (default: off)")
    parser.add_argument("--out", type=Path, help="JSON file (default: none)")
    args = parser.parse_args()
    with joined(args) as (processes, parallel):
        found = {"processes": processes.count, **measure(parallel, args.layers, args.batch, args.steps, tiny=args.tiny)}
        if processes.is_first:
            if args.out is not None:
                args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(found))
    return 0


def measure(parallel: ParallelConfig, layers: int, batch: int, steps: int, *, tiny: bool) -> dict[str, Any]:
    """Medians of decode steps after 1024 tokens.

    Returns:
      "dispatch_us": until the launches of a step (layers and picking) are out, the devices idle before; "latency_us":
      until its tokens are there; "step_us" of many in a row; "arguments" of the layers' executable; "place_us" and
      "place_packed_us": until the host's arrays of a step are on their way to the devices, each by itself, as the
      engine does it, and packed into one that an executable takes apart.
    """
    import jax
    import jax.numpy as jnp

    from benchmarks.multi_gpu.mesh_model import Case, MeshModel
    from benchmarks.multi_gpu.weights import MAKERS, model_config
    from minimax_jax.parallel import Ranks

    config, dtype = model_config(layers, "tiny" if tiny else "narrow"), jnp.float32 if tiny else jnp.bfloat16
    ranks = Ranks(config, parallel)
    past, rows = 40 if tiny else 1024, -(-batch // ranks.groups)
    width = past // config.index_block_size + 1
    model = MeshModel(
        config, ranks, MAKERS["bf16"](config, ranks, dtype), pages=rows * width, rows=(rows,), width=width, dtype=dtype
    )
    step = model.compiled(Case("decode", batch, past))
    for _ in range(3):
        jax.block_until_ready(step())
    dispatch, latency = [], []
    for _ in range(steps):
        began = time.perf_counter()
        tokens = step()
        dispatch.append(time.perf_counter() - began)
        jax.block_until_ready(tokens)
        latency.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(steps):
        tokens = step()
    jax.block_until_ready(tokens)
    in_a_row = (time.perf_counter() - began) / steps
    return {
        "layers": layers,
        "batch": batch,
        "arguments": len(jax.tree.leaves((model.model.leaves, model.pool.caches, step.inputs))),
        "dispatch_us": statistics.median(dispatch) * 1e6,
        "latency_us": statistics.median(latency) * 1e6,
        "step_us": in_a_row * 1e6,
        **_place_times(ranks, step.inputs, steps),
    }


def _place_times(ranks: Any, inputs: Any, steps: int) -> dict[str, float]:
    import jax
    import numpy as np

    sent = jax.tree.leaves(inputs)
    host = [np.zeros(array.shape, array.dtype) for array in sent]
    groups = ranks.groups
    shapes = [(array.shape[0] // groups, *array.shape[1:]) for array in host]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])

    def apart(packed):
        pieces = np.split(np.arange(ends[-1]), ends[:-1])
        return [packed[0, p[0] : p[-1] + 1].reshape(shape) for p, shape in zip(pieces, shapes, strict=True)]

    unpack = jax.jit(ranks.per_rank(apart, (ranks.rows,), [ranks.rows] * len(host)))

    def packed():
        together = np.concatenate([array.reshape(groups, -1) for array in host], axis=1)
        return unpack(ranks.place(together, ranks.rows))

    ways = {"place_us": lambda: ranks.place(host, [ranks.rows] * len(host)), "place_packed_us": packed}
    found = {}
    for name, run in ways.items():
        jax.block_until_ready(run())
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            placed = run()
            times.append(time.perf_counter() - began)
            jax.block_until_ready(placed)
        found[name] = statistics.median(times) * 1e6
    return found


if __name__ == "__main__":
    sys.exit(main())
