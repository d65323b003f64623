#!/usr/bin/env python3
"""Compiles the kernels for an H100 on a machine without one, and shows what they became.

  python scripts/inspect_kernels.py                       prefill and decode shapes of TP1 and one TP8 rank
  python scripts/inspect_kernels.py --tokens 64 --requests 64 --context 65536 --ops msa

Needs a jax with its CUDA plugin (pip install "jax[cuda13]==0.11.2"; no driver, no GPU) and ptxas on the PATH or in
the nvidia-cuda-nvcc package. For each kernel: grid, threads and shared memory as XLA launches it, registers and
spills as ptxas counts them, and the instructions that tell whether matrix products use wgmma and loops are pipelined
(cp.async).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from h100 import h100s, lowering_for_h100  # noqa: E402 - the script's neighbour

INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "mma": "mma.sync.aligned", "cp.async": r"cp.async.c[ag]", "ex2": "ex2"}
OPS = (
    "index_score", "select_blocks", "sparse_attention", "dense_attention", "msa", "write_kv_index", "norm_rope",
    "project_norm_rope", "matmul", "matmul-swiglu", "routed_experts", "add_norm", "choose_experts", "route_tokens",
    "sampling_cut",
)  # fmt: skip


def main() -> int:
    """Compiles what was asked for and prints a line a kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--tp", type=int, choices=(1, 8), help="1: 64/4 heads; 8: one rank's 8/1 (default: both)")
    parser.add_argument("--tokens", type=int, help="new tokens (default: 8192 of prefill, then 64 of decode)")
    parser.add_argument("--requests", type=int, default=1, help="requests that share the tokens (default: 1)")
    parser.add_argument("--context", type=int, default=32768, help="tokens of context a request (default: 32768)")
    parser.add_argument("--cache-dtype", choices=("bfloat16", "fp8"), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--keep", type=Path, help="folder to keep XLA's dumps in (PTX, HLO, Triton's passes)")
    args = parser.parse_args()
    ops = args.ops.split(",")
    if unknown := sorted(set(ops) - set(OPS)):
        parser.error(f"--ops: {unknown[0]!r} must be one of {', '.join(OPS)}")
    ptxas = _find_ptxas()
    if ptxas is None:
        parser.error("ptxas is not on the PATH, and no nvidia-cuda-nvcc package has it")
    sizes = [(args.tokens, args.requests)] if args.tokens else [(8192, 1), (64, 64)]
    with tempfile.TemporaryDirectory() as temporary:
        dumps = args.keep or Path(temporary)
        dumps.mkdir(parents=True, exist_ok=True)
        flags = f"--xla_dump_to={dumps} --xla_gpu_dump_llvmir=true --xla_dump_emitter_re=.* --xla_dump_hlo_pass_re="
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"  # read when jax is imported
        os.environ["JAX_PLATFORMS"] = "cpu"
        for tp in (args.tp,) if args.tp else (1, 8):
            for tokens, requests in sizes:
                print(f"TP{tp}, {tokens} tokens of {requests} requests, {args.context} of context", flush=True)
                for op in ops:
                    before = set(dumps.iterdir())
                    _compile(op, tp, tokens, requests, args.context, args.cache_dtype)
                    _report(op, set(dumps.iterdir()) - before, ptxas)
    return 0


def _find_ptxas() -> str | None:
    for folder in sys.path:
        for path in Path(folder).glob("nvidia/*/bin/ptxas"):
            return str(path)
    return shutil.which("ptxas")


def _compile(op: str, tp: int, tokens: int, requests: int, context: int, cache_dtype: str) -> None:
    import jax
    import jax.numpy as jnp

    import minimax_kernels as mk

    sharding = jax.sharding.SingleDeviceSharding(h100s(1)[0])

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    heads, kv_heads, blocks = 64 // tp, max(4 // tp, 1), -(-context // 128)
    pages = requests * blocks
    ints = {"dtype": jnp.int32}
    batch = mk.Batch(array(requests, blocks, **ints), array(requests + 1, **ints), array(requests, **ints))
    stored = {"dtype": jnp.float8_e4m3fn if cache_dtype == "fp8" else jnp.bfloat16}
    q, cache = array(tokens, heads, 128), array(pages, kv_heads, 128, 128, **stored)
    idx_q, index_cache = array(tokens, kv_heads, 128), array(pages, 128, 128, **stored)
    rows = array(tokens, kv_heads, 128)
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "index_score": ((idx_q, index_cache, batch), {}),
        "select_blocks": ((array(kv_heads, tokens, blocks, dtype=jnp.float32), batch), {"topk": 16}),
        "sparse_attention": ((q, cache, cache, array(kv_heads, tokens, 16, **ints), batch), {"scale": 0.088}),
        "dense_attention": ((q, cache, cache, batch), {"scale": 0.088}),
        "msa": ((q, cache, cache, idx_q, index_cache, batch), {"scale": 0.088, "topk": 16}),
        "write_kv_index": ((cache, cache, index_cache, rows, rows, array(tokens, 1, 128), array(tokens, **ints)), {}),
        "norm_rope": (
            ((q, rows, idx_q, array(tokens, 1, 128)), (array(128),) * 4, *(array(tokens, 32, dtype=jnp.float32),) * 2),
            {"eps": 1e-6},
        ),
        "sampling_cut": (
            (array(min(tokens, 64), 200064, dtype=jnp.float32), array(min(tokens, 64), **ints))
            + (array(min(tokens, 64), dtype=jnp.float32),) * 2,
            {},
        ),
        **_weight_calls(array, tp, tokens),
    }
    args, options = calls[op]
    with lowering_for_h100():
        function = getattr(mk, op.partition("-")[0])
        lowered = jax.jit(lambda *args: function(*args, impl="pallas_triton", **options)).lower(*args)
    lowered.compile()


def _weight_calls(array: Any, tp: int, tokens: int) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """One rank's projections of attention, shared expert and 16 experts; at TP1 all heads and 16 of the experts."""
    import jax.numpy as jnp

    import minimax_kernels as mk

    def mxfp8(*shape: int) -> Any:
        *lead, inputs, outputs = shape
        values = array(*lead, outputs, inputs, dtype=jnp.float8_e4m3fn)
        return mk.Mxfp8(values, array(*lead, outputs, inputs // 32, dtype=jnp.uint8))

    x, f32 = array(tokens, 6144), {"dtype": jnp.float32}
    heads, kv_heads = 64 // tp, max(4 // tp, 1)
    projections = [mxfp8(6144, 128 * count) for count in (heads, kv_heads, kv_heads, kv_heads, 1)]
    choice = array(tokens, 4, dtype=jnp.int32), array(tokens, 4, **f32)
    experts = mxfp8(16, 6144, 6144), mxfp8(16, 3072, 6144)
    swiglu = mk.Swiglu(1.702, 1.0, 7.0)
    norm, angles = array(128), array(tokens, 32, **f32)
    norms = norm, norm, None, norm, norm
    return {
        "project_norm_rope": ((x, tuple(projections), norms, angles, angles), {"eps": 1e-6}),
        "matmul": ((x, tuple(projections)), {}),
        "matmul-swiglu": ((x, mxfp8(6144, 6144 // tp)), {"activation": swiglu}),
        "routed_experts": ((x, *choice, *experts, x), {"activation": swiglu, "num_experts": 128}),
        "add_norm": ((x, x, array(6144)), {"eps": 1e-6}),
        "choose_experts": ((array(tokens, 128, **f32), array(128, **f32)), {"num_chosen": 4}),
        "route_tokens": ((array(min(tokens, 64), 6144), array(6144, 128, **f32), array(128, **f32)), {"num_chosen": 4}),
    }


def _report(op: str, files: set[Path], ptxas: str) -> None:
    launches = next(path for path in files if path.name.endswith("thunk_sequence.txt")).read_text()
    found = re.findall(r"\] (\w+) grid: (\[[\d, ]+\]) threads: \[(\d+).*?shared_memory: (\d+)", launches)
    resources, counts = {}, {}
    for path in files:
        if path.suffix != ".ptx":
            continue
        text = path.read_text()
        said = subprocess.run([ptxas, "-arch=sm_90a", "-v", path, "-o", os.devnull], capture_output=True, text=True)
        if said.returncode:
            raise SystemExit(f"ptxas failed on {path.name}: {said.stderr.strip()}")
        for name, used in re.findall(r"entry function '(\w+)'(.*?)(?=Compiling|$)", said.stderr, re.DOTALL):
            spills, registers = re.search(r"(\d+) bytes spill stores", used), re.search(r"Used (\d+) registers", used)
            resources[name] = tuple(int(match[1]) if match else 0 for match in (registers, spills))
        for entry in re.split(r"\n(?=\.visible \.entry)", text)[1:]:
            name = entry.split("(")[0].split()[-1]
            counts[name] = {label: len(re.findall(pattern, entry)) for label, pattern in INSTRUCTIONS.items()}
    others = 0
    for name, grid, threads, shared in found:
        if "fusion" in name or (name.startswith("sort") and name != "sort_pairs"):
            others += 1
            continue
        registers, spills = resources.get(name, (0, 0))
        uses = " ".join(f"{label} {count}" for label, count in counts.get(name, {}).items() if count)
        print(
            f"  {op:18s}{name:27s}grid {grid:18s}{threads:>5s} threads{int(shared) / 1024:6.1f} KB "
            f"{registers:4d} registers {spills} B spilled | {uses}",
            flush=True,
        )
    if others:
        print(f"  {op:18s}and {others} of XLA's own (its sort; with a GPU there it calls CUB)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
