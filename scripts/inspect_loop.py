#!/usr/bin/env python3
"""Compiles the engine's loop of decode steps for an H100 on a machine without one; says what lies outside of its graph.

  python scripts/inspect_loop.py                          greedy, sampled, and all that a request may ask for
  python scripts/inspect_loop.py --moe --batch 1 --keep dumps

Needs a jax with its CUDA plugin (pip install "jax[cuda13]==0.11.2"; no driver, no GPU). Over one TP8 rank's share of
M3, as scripts/bench_engine.py takes it. One call that fits into no CUDA graph keeps the whole loop out of it: then the
host launches every step, and waits for the device to learn whether there is another one. XLA's sorts by the CUB
library, which needs a GPU to be compiled for, do not show here: sorts are printed by name.
Exit status: 0, or 1 when some loop lies outside.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from h100 import h100s, lowering_for_h100  # noqa: E402 - the script's neighbour

STEPS = 8


def main() -> int:
    """Compiles what was asked for and prints a line a loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, default=2, help="layers; each further one adds the same again (default: 2)")
    add("--batch", type=int, default=64, help="sequences (default: 64)")
    add("--pages", type=int, default=64, help="pages of a block table (default: 64)")
    add("--moe", action="store_true", help="layers with 16 experts instead of an MLP (default: off)")
    add("--keep", type=Path, metavar="DIR", help="folder to keep XLA's dumps in (default: none)")
    args = parser.parse_args()
    fine = True
    with tempfile.TemporaryDirectory() as temporary:
        dumps = args.keep or Path(temporary)
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dumps}"  # read when jax is imported
        )
        os.environ["JAX_PLATFORMS"] = "cpu"
        from minimax_jax.engine.step_inputs import LOOP_FEATURES

        for name, features in zip(("greedy", "sampled", "everything"), LOOP_FEATURES, strict=True):
            before = set(dumps.glob("*"))
            compile_loop(args.layers, args.batch, args.pages, features, moe=args.moe)
            (path,) = (path for path in set(dumps.glob("*")) - before if path.name.endswith("after_thunk_passes.txt"))
            kinds, outside = launches(path.read_text())
            sorts = sorted({kind for kind in kinds if "sort" in kind.lower() and kind != "sort_pairs"})
            print(
                f"{name}: {len(kinds)} launches in the loop, {'in' if not outside else 'NOT in'} one graph"
                + (f"; outside: {', '.join(outside)}" if outside else "")
                + (f"; XLA sorts: {', '.join(sorts)}" if sorts else ""),
                flush=True,
            )
            fine &= not outside
    return int(not fine)


def launches(text: str) -> tuple[list[str], list[str]]:
    """(what the body of the one loop in a dumped sequence of thunks launches, kinds of what lies in no graph)."""
    found = [re.match(r"( *)(?:\d+: (k\w+) +\[.*?\] *(\w*)|(body):)", line) for line in text.splitlines()]
    lines = [(len(match[1]), match[2], match[3], match[4]) for match in found if match]
    start = next(i for i, line in enumerate(lines) if line[3])
    (loop,) = (line for line in lines if line[1] == "kWhile")
    body = [line for line in lines[start + 1 :] if line[0] > lines[start][0]]
    names = [name or kind for _, kind, name, _ in body if kind and kind != "kCommandBuffer"]
    if loop[0] > 0:  # it lies in a graph itself
        return names, []
    least = min(line[0] for line in body)
    return names, [kind for indent, kind, _, _ in body if indent == least] + ["kWhile"]


def compile_loop(layers: int, batch: int, pages: int, features: Any, *, moe: bool) -> None:
    """Compiles a loop of `STEPS` steps of `batch` rows, whose block tables have `pages` pages."""
    import jax
    import jax.numpy as jnp

    from benchmarks.segments.rank_model import rank_config
    from minimax_jax.cache import PagePool
    from minimax_jax.engine.graph_options import LOOPS_IN_GRAPHS
    from minimax_jax.engine.row_state import Adjustments, empty_rows
    from minimax_jax.engine.sampler import SamplingState
    from minimax_jax.engine.step_inputs import EVERYTHING, PickInputs, StepInputs
    from minimax_jax.engine.steps import Steps
    from minimax_jax.model import abstract_model, split_model
    from minimax_kernels import Batch

    sharding = jax.sharding.SingleDeviceSharding(h100s(1)[0])
    config = rank_config(layers, moe=moe, tiny=False)
    graphdef, shapes = split_model(abstract_model(config, jnp.bfloat16))

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype), tree)

    ids, f32, u32 = array(batch), array(batch, dtype=jnp.float32), array(batch, dtype=jnp.uint32)
    most = 1024 if features == EVERYTHING else 0
    step = StepInputs(ids, ids, ids, ids, Batch(array(batch, pages), array(batch + 1), ids), ids)
    changes = array(batch, most), array(batch, most, dtype=jnp.float32), array(batch, most or 16), ids
    picking = PickInputs(
        ids, ids, ids, SamplingState(f32, f32, f32, ids, u32, u32), Adjustments(f32, f32, f32, *changes)
    )
    caches = placed(jax.eval_shape(lambda: PagePool(config, batch * pages, jnp.bfloat16).caches))
    state = placed(jax.eval_shape(lambda: empty_rows(batch, config.vocab_size)))
    leaves = [placed(leaf) for leaf in shapes.values()]
    backend, jax.default_backend = jax.default_backend, lambda: "gpu"  # by which operations choose their kernels
    try:
        with lowering_for_h100():
            decode = Steps(config, graphdef, tuple(shapes)).decode
            lowered = decode.lower(caches, state, leaves, step, picking, ids, features=features, num_steps=STEPS)
    finally:
        jax.default_backend = backend
    lowered.compile(LOOPS_IN_GRAPHS)


if __name__ == "__main__":
    sys.exit(main())
