#!/usr/bin/env python3
"""The peer's times on this GPU: vLLM's Triton kernels over the cases of scripts/gpu_check.py.

  python scripts/bench_vllm.py vllm-0.33.0 --out results       an unpacked source distribution of vLLM
  python scripts/gpu_check.py --only bench --baseline results/vllm.jsonl

First checks them against the references on small cases. Writes vllm.jsonl (a line a case, after each case) and
vllm.json (machine and versions) to --out. Needs torch and Triton; vLLM itself need not be installed.
Exit status: 0; 1 when a result was wrong or a case failed; 2 when nothing can be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when jax starts: torch needs the memory

import torch  # noqa: E402

from benchmarks.case_arguments import add_case_arguments, select_jobs, tps_of  # noqa: E402
from benchmarks.case_data import Queries, pool_pages, sets_for  # noqa: E402
from benchmarks.cases import HEADS  # noqa: E402
from benchmarks.machine import describe_machine  # noqa: E402
from benchmarks.measure import Job, queries_for  # noqa: E402
from benchmarks.peer import vllm_kernels  # noqa: E402
from benchmarks.peer.check import check  # noqa: E402
from benchmarks.peer.inputs import index_queries, make_inputs, make_pool  # noqa: E402
from benchmarks.peer.measure import Operations, measure_decode, measure_prefill, row_of  # noqa: E402


def say(text: str) -> None:
    """Progress, with the time since the start."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, help="folder of vLLM's sources")
    parser.add_argument("--out", type=Path, default=Path("vllm"), help="folder for results (default: %(default)s)")
    parser.add_argument("--limit-s", type=float, default=540, help="seconds; what is left out is said (default: 540)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="torch's; cpu: a try")
    add_case_arguments(parser)
    return parser.parse_args()


def measure_job(kernels: vllm_kernels.VllmKernels, job: Job, queries: Queries, device: torch.device) -> list[dict]:
    """The rows of one case."""
    case, heads = job.case, job.heads
    sets = sets_for(case, heads)
    pool = make_pool(pool_pages(case, sets), heads, device)
    operations = Operations(kernels, case, heads, pool)
    rows = []
    for rho in job.rhos:
        inputs = make_inputs(case, heads, pool, index_queries(queries, rho, case.tokens, device), sets)
        timed = measure_decode if case.phase == "decode" else measure_prefill
        rows.append(row_of(case, heads, rho, timed(operations, inputs)))
        text = ", ".join(f"{name} {value:g}" for name, value in rows[-1].items() if name.endswith(("_us", "union8")))
        say(f"{case.phase} {case.short_name} tp{heads.tp}" + f" rho {rho}" * (case.phase == "prefill") + f": {text}")
    return rows


def main() -> int:
    """Checks, then measures what was asked for."""
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no GPU; cpu tries the harness", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    try:
        kernels = vllm_kernels.load(args.sources)
    except (ValueError, ImportError) as error:
        print(f"bench_vllm: {error}", file=sys.stderr)
        return 2
    jobs = select_jobs(args)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"vllm": kernels.version, "torch": torch.__version__, **describe_machine()}
    (args.out / "vllm.json").write_text(json.dumps(record, indent=1) + "\n")
    wrong = [text for tp in tps_of(args) for text in check(kernels, HEADS[tp], device)]
    for text in wrong:
        say(f"WRONG: {text}")
    say(f"vLLM {kernels.version}, torch {torch.__version__}, {record['device']}: {len(jobs)} cases")
    queries, failed, left = queries_for(jobs), 0, 0
    with (args.out / "vllm.jsonl").open("w") as file:
        for job in jobs:
            if time.monotonic() - START > args.limit_s:
                left += 1
                continue
            try:
                rows = measure_job(kernels, job, queries[job.heads], device)
            except RuntimeError as error:  # out of memory, or a kernel that does not run here
                failed += 1
                say(f"FAILED {job.case.phase} {job.case.short_name} tp{job.heads.tp}: {error}")
                continue
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
    if left:
        say(f"left out for lack of time: {left} cases")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
