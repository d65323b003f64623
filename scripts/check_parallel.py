#!/usr/bin/env python3
"""One command on a host with several GPUs: do layouts and processes give one device's tokens, and how fast?

  python scripts/check_parallel.py --devices 8 --out results
  python scripts/check_parallel.py --devices 4 --cpu --layouts 4,4,1 --out /tmp/try      a try without GPUs

For each layout (tensor, expert, attention_data), in one process and in one a device: greedy tokens in float32 against
those of one device, then `minimax-jax bench`. At the end one of the processes is killed in mid-generation: the others
must end by themselves, and name it. Writes parallel.json and every command's output to --out; progress goes to
standard output. Exit status: 0, or 1 if anything failed or differed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.multi_gpu.ending import interrupt_on_signals, run_within  # noqa: E402
from benchmarks.multi_gpu.launching import environment, kill_one, over_devices, said_of  # noqa: E402

PROMPT = "And it came to pass, that the kernel"
LAYOUTS = {
    2: ("2,2,1", "1,2,2"),
    4: ("4,4,1", "2,4,2", "1,4,4"),
    8: ("8,8,1", "4,8,1", "2,8,4", "1,8,8"),
}
KILL_BEGIN_S = 60.0  # seconds that the run with a lost process has to begin at least, even after --limit-s
LEAST_S = 5.0  # seconds that are left, with fewer of which nothing begins
START = time.monotonic()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--devices", type=int, choices=tuple(LAYOUTS), default=8, help="GPUs of this host to use (default: 8)")
    add("--cpu", action="store_true", help="simulate them on the CPU (default: off)")
    add("--model", default="tiny", metavar="DIR", help="checkpoint directory; tiny: the embedded one (default: tiny)")
    add("--layouts", metavar="T,E,A;...", help="layouts to try (default: one of each kind)")
    add("--new-tokens", type=int, default=16, help="to compare (default: 16)")
    add("--no-bench", action="store_true", help="compare tokens only (default: measure too)")
    add("--limit-s", type=float, default=540, help="seconds for everything; what is left out is said (default: 540)")
    add("--out", type=Path, default=Path("parallel"), metavar="DIR", help="folder for results (default: parallel)")
    return parser.parse_args()


def say(text: str) -> None:
    """Progress, with the time since the start."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def command(args: argparse.Namespace, what: list[str], layout: str, processes: int) -> list[str]:
    """`minimax-jax` with a layout, in so many processes."""
    return over_devices("minimax_jax", [*what, "--model", args.model], sizes_of(layout), processes, cpu=args.cpu)


def sizes_of(layout: str) -> tuple[int, int, int]:
    """tensor, expert, attention_data."""
    tensor, expert, data = map(int, layout.split(","))
    return tensor, expert, data


def run(args: argparse.Namespace, name: str, argv: list[str]) -> tuple[str | None, str]:
    """(standard output, what went wrong); None if it failed. Both streams are kept in --out."""
    left = START + args.limit_s - time.monotonic()
    if left < LEAST_S:
        return None, "left out for want of time"
    with (args.out / f"{name}.out").open("w+") as out, (args.out / f"{name}.err").open("w+") as err:
        code = run_within(argv, left, stdout=out, stderr=err, env=environment())
        if code is None:
            return None, "out of time"
        out.seek(0)
        err.seek(0)
        lines = err.read().splitlines()
        return (out.read(), "") if code == 0 else (None, f"status {code}: {lines[-1] if lines else ''}")


def tokens_of(args: argparse.Namespace, name: str, layout: str, processes: int) -> tuple[Any, str]:
    """(the JSON of a greedy generation, what went wrong)."""
    what = ["generate", "--prompt", PROMPT, "--max-new-tokens", str(args.new_tokens), "--temperature", "0"]
    what += ["--ignore-eos", "--dtype", "float32", "--json"]
    text, wrong = run(args, f"generate_{name}", command(args, what, layout, processes))
    return (None if text is None else json.loads(text)), wrong


def measure(args: argparse.Namespace, name: str, layout: str, processes: int) -> Any:
    """What `minimax-jax bench` gives, or what went wrong."""
    folder = args.out / f"bench_{name}"
    what = ["bench", "--batch-sizes", "8,64", "--input-lens", "256", "--output-len", "16", "--num-prompts", "64"]
    _, wrong = run(
        args, f"bench_{name}", command(args, [*what, "--repeats", "2", "--out", str(folder)], layout, processes)
    )
    return {"error": wrong} if wrong else json.loads((folder / "bench.json").read_text())


def main() -> int:
    """Runs everything, or ends what it has started when it is interrupted."""
    args = arguments()
    interrupt_on_signals()
    try:
        return check(args)
    except KeyboardInterrupt:
        say("interrupted; what was measured is in --out")
        return 130


def check(args: argparse.Namespace) -> int:
    """All layouts, and one lost process; what is done is on disk even if a later part fails."""
    args.out.mkdir(parents=True, exist_ok=True)
    layouts = args.layouts.split(";") if args.layouts else LAYOUTS[args.devices]
    report: dict[str, Any] = {"model": args.model, "devices": args.devices, "runs": []}
    say("one device ...")
    expected, wrong = tokens_of(args, "one", "1,1,1", 1)
    if expected is None:
        say(f"failed: {wrong}")
        return 1
    fine = True
    for layout in layouts:
        for processes in (1, args.devices):
            name = f"{layout.replace(',', '_')}_in_{processes}"
            say(f"tensor, expert, attention_data = {layout} in {processes} process{'es' if processes > 1 else ''} ...")
            found, wrong = tokens_of(args, name, layout, processes)
            same = found is not None and found["token_ids"] == expected["token_ids"]
            entry = {"layout": layout, "processes": processes, "same_tokens": same, "error": wrong}
            entry["timings"] = None if found is None else found["timings"]
            if same and not args.no_bench:
                entry["bench"] = measure(args, name, layout, processes)
            fine &= same and "error" not in entry.get("bench", {})
            say(f"  tokens {'as on one device' if same else 'DIFFER' if found else wrong}")
            report["runs"].append(entry)
            (args.out / "parallel.json").write_text(json.dumps(report, indent=1) + "\n")
    say(f"killing one of {args.devices} processes ...")
    left = START + args.limit_s - time.monotonic()
    report["kill"] = kill_one(
        sizes_of(layouts[0]), args.devices, args.out, begin_s=max(left, KILL_BEGIN_S), cpu=args.cpu, model=args.model
    )
    say(f"  {said_of(report['kill'])}")
    (args.out / "parallel.json").write_text(json.dumps(report, indent=1) + "\n")
    return 0 if fine and report["kill"]["fine"] else 1


if __name__ == "__main__":
    sys.exit(main())
