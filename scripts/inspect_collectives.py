#!/usr/bin/env python3
"""Compiles a layer with experts for eight H100s on a machine without one, and shows what runs beside its collectives.

  python scripts/inspect_collectives.py                                          layouts of one host, decode and prefill
  python scripts/inspect_collectives.py --layouts 1,8,8 --all-to-all --tokens 8192

Needs a jax with its CUDA plugin (pip install "jax[cuda13]==0.11.2"; no driver, no GPU). A layout is tensor, expert,
attention_data; tokens are those of one data rank. The shared expert's two products should lie beside the collective
that brings the routed experts' sums back; exit status 1 if none does in a layout with data ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from h100 import h100s, lowering_for_h100  # noqa: E402 - the script's neighbour

LAYOUTS = "1,8,8;2,8,4;8,8,1"


def main() -> int:
    """Compiles what was asked for and prints a line a collective."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layouts", default=LAYOUTS, metavar="T,E,A;...", help="of eight devices (default: %(default)s)")
    add("--tokens", type=int, help="of one data rank (default: 8, then 1024)")
    add("--hosts", type=int, default=1, metavar="N", help="gather in two levels (default: 1)")
    add("--all-to-all", action="store_true", help="send tokens to their experts' ranks only (default: off)")
    add("--keep", type=Path, metavar="DIR", help="folder to keep the compiled HLO in (default: none)")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported
    from benchmarks.multi_gpu.schedule import beside_collectives

    fine = True
    for layout in args.layouts.split(";"):
        for tokens in (args.tokens,) if args.tokens else (8, 1024):
            options = {"hosts": args.hosts, "all_to_all_tokens": 1 if args.all_to_all else None}
            text = compiled_layer(tuple(map(int, layout.split(","))), tokens, options)
            if args.keep is not None:
                args.keep.mkdir(parents=True, exist_ok=True)
                (args.keep / f"layer_{layout.replace(',', '_')}_{tokens}.hlo").write_text(text, encoding="utf-8")
            print(f"{layout}, {tokens} tokens a data rank", flush=True)
            found = beside_collectives(text)
            for own in found:
                how = f"{len(own.products)} products, {own.others} others" if own.asynchronous else "waited for"
                print(f"  {own.kind:18s}{own.shape[:60]:62s}{how}", flush=True)
            data = int(layout.split(",")[2])
            fine &= data == 1 or any(own.products for own in found)
    return int(not fine)


def compiled_layer(sizes: tuple[int, ...], tokens: int, options: dict[str, Any]) -> str:
    """Optimised HLO of M3's norm, experts and residual over eight H100s.

    Args:
      sizes, options: of `ParallelConfig`.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from benchmarks.multi_gpu.weights import model_config
    from minimax_jax.model import abstract_model, merge_model, split_model
    from minimax_jax.parallel import ParallelConfig, Ranks

    ranks = Ranks(model_config(2), ParallelConfig(*sizes, **options), h100s(8))
    layout, hidden = ranks.layout, ranks.layout.config.hidden_size
    _, shapes = split_model(abstract_model(layout.config, jnp.bfloat16))
    graphdef, _ = split_model(abstract_model(layout.local_config, jnp.bfloat16))
    names = tuple(shapes)

    def array(shape: tuple[int, ...], dtype: Any, spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(ranks.mesh, spec))

    specs = ranks.weight_specs(names)
    leaves = [
        array(ranks.global_shape(name, shapes[name].shape), shapes[name].dtype, spec)
        for name, spec in zip(names, specs, strict=True)
    ]

    def rank(leaves: list[Any], x: Any) -> Any:
        layer = merge_model(graphdef, dict(zip(names, leaves, strict=True))).layers[1]
        return x + ranks.comm.sum_mlp(layer.mlp(layer.post_attention_layernorm(x), ranks.comm))

    x = array((tokens * ranks.groups, hidden), jnp.bfloat16, ranks.rows)
    with lowering_for_h100():
        lowered = jax.jit(ranks.per_rank(rank, (specs, ranks.rows), ranks.rows)).lower(leaves, x)
    return lowered.compile().as_text()


if __name__ == "__main__":
    sys.exit(main())
