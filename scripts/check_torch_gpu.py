#!/usr/bin/env python3
"""One command on a GPU: is the torch bridge right there, and how fast is transformers' model with it?

  python scripts/check_torch_gpu.py --out results            one H100: about a minute
  python scripts/check_torch_gpu.py --device cpu --small     a try without a GPU

Parts: addresses (nothing is copied), streams (a side stream, behind slow work and in front of writes), model (turns
against one pass, on this device), logits and tokens (transformers' MiniMax-M3 with its own attention and with these
kernels, bfloat16), speed (eager, sdpa and these kernels at 8192 tokens of context), compiled (torch.compile and
opcheck). Writes torch_bridge.json to --out.
Needs torch and transformers. Exit status: 0, or 1 when a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when jax starts: torch needs memory too

import jax  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from benchmarks.torch_bridge import memory_checks, model_checks, transformers_checks  # noqa: E402

PARTS = {
    "addresses": memory_checks,
    "streams": memory_checks,
    "model": model_checks,
    "logits": transformers_checks,
    "tokens": transformers_checks,
    "speed": transformers_checks,
    "compiled": memory_checks,
}


def say(text: str) -> None:
    """Progress, with the time since the start."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def main() -> int:
    """Runs the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("torch_bridge"), help="folder for results (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="torch's (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try it on a CPU")
    parser.add_argument("--parts", default=",".join(PARTS), help="parts to run, in this order (default: %(default)s)")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts: {unknown[0]!r} must be one of {', '.join(PARTS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; --device cpu --small tries it without one")
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    report: dict = {
        "device": torch.cuda.get_device_name(0) if args.device == "cuda" else "cpu",
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "small": args.small,
    }
    say(f"{report['device']}: {', '.join(f'{name} {version}' for name, version in report['versions'].items())}")
    args.out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        try:
            more = {"say": say} if part == "speed" else {}
            report[part] = getattr(PARTS[part], part)(device, args.small, **more)
        except Exception as error:  # noqa: BLE001 - the other parts still tell something
            traceback.print_exc()
            report[part] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        say(f"{part}: {'ok' if report[part]['ok'] else 'FAILED'} {json.dumps(report[part])}")
        report["seconds"] = round(time.monotonic() - START, 1)
        (args.out / "torch_bridge.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if all(report[part]["ok"] for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
