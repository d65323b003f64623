#!/usr/bin/env python3
"""MiniMax-M3 over the GPUs of one host, in one command: is it one GPU's model, and how fast is it?

  python scripts/bench_multi_gpu.py --tp 8 --ep 8 --out results                  under 8 minutes
  python scripts/bench_multi_gpu.py --tp 8 --ep 8 --attention-dp --out results   each GPU attends its own requests
  python scripts/bench_multi_gpu.py --tp 8 --ep 8 --tiny --cpu-devices 8         a try without GPUs

Parts, in this order, each in a process of its own; OUT/multi_gpu_PART.json is written after every row:
  parity    the embedded checkpoint in float32: greedy tokens and selected blocks as on one GPU, also with shared-out
            index keys and, where GPUs attend their own requests, with the all-to-all
  full      M3 at full width with random weights, as many layers as fit: prefill and decode step times, the collectives'
            share, segments against whole steps, resizing and capturing again, the all-to-all, shared-out index keys
  dispatch  the host's time for a decode step, in one process and in one a GPU
  kill      one of several processes is killed in mid-generation: the others must end, and name it
  serve     random requests through LLM for --minutes, or what time is left: none lost, memory flat
Exit status: 0, or 1 if anything failed, differed or was lost. What was left out for want of time is said.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

# seconds that each part may take at most, within --limit-s
LIMITS = {"parity": 90.0, "full": 200.0, "dispatch": 90.0, "kill": 100.0, "serve": 600.0}
_CPU_PATIENCE = 8  # times as many seconds for simulated devices
_GRACE = 20.0  # seconds after which a part that should have ended is ended
_LEAST_S = 15.0  # seconds that are left, with fewer of which no part begins
_BEGIN_S = 40.0  # seconds that a generation has for its first token at least
_COMPILE_S = 25.0  # seconds that what is being compiled may still take when a part ends
_ROW_S = 25.0  # seconds that a row of parity takes once JAX has started
_MEMORY_FRACTION = "0.92"  # of a GPU, for JAX
_NO_TRIALS = "--xla_gpu_autotune_level=0"  # else XLA tries out float32 products, some 100 s where compiling takes 12


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tp", type=int, default=8, metavar="N", help="ranks that share heads (default: 8)")
    add("--ep", type=int, metavar="N", help="ranks that experts are dealt to (default: all)")
    add(
        "--attention-dp",
        type=int,
        nargs="?",
        const=0,
        default=1,
        metavar="N",
        help="groups of --tp ranks, each with requests of its own; without N the --tp ranks are as many groups "
        "(default: 1)",
    )
    add("--parts", default=",".join(LIMITS), help="parts to run (default: %(default)s)")
    add("--out", type=Path, default=Path("multi_gpu"), metavar="DIR", help="folder for results (default: multi_gpu)")
    add("--weights", default="bf16", metavar="FORMAT", help="at full width: bf16 or mxfp8 (default: bf16)")
    add("--layers", type=int, default=60, metavar="N", help="at most, at full width (default: 60)")
    add("--serve-layers", type=int, default=4, metavar="N", help="layers that serve (default: 4)")
    add("--dispatch-layers", type=int, default=16, metavar="N", help="layers that are dispatched (default: 16)")
    add("--minutes", type=float, default=3, help="of serving, where so much time is left (default: 3)")
    add("--limit-s", type=float, default=470, help="seconds for everything; what is left out is said (default: 470)")
    add("--tiny", action="store_true", help="small sizes (default: off)")
    add("--cpu-devices", type=int, metavar="N", help="run on N simulated CPU devices (default: GPUs)")
    add("--as-part", action="store_true", help="what this script gives its own processes (default: off)")
    args = parser.parse_args()
    if unknown := sorted(set(args.parts.split(",")) - set(LIMITS)):
        parser.error(f"--parts: {unknown[0]!r} must be one of {', '.join(LIMITS)}")
    for name in ("layers", "serve_layers", "dispatch_layers"):
        if getattr(args, name) < 2:
            parser.error(f"--{name.replace('_', '-')} = {getattr(args, name)}: must be at least 2")
    if args.attention_dp == 0:
        args.attention_dp, args.tp = args.tp, 1
    if args.ep is None:
        args.ep = args.tp * args.attention_dp
    from benchmarks.multi_gpu.weights import MAKERS  # here, so that --help needs no JAX
    from minimax_jax.parallel import ParallelConfig, ParallelError

    if args.weights not in MAKERS:
        parser.error(f"--weights = {args.weights}: must be one of {', '.join(MAKERS)}")
    try:
        devices = ParallelConfig(args.tp, args.ep, args.attention_dp).num_devices
    except ParallelError as error:
        parser.error(str(error))
    if devices == 1 and "kill" in args.parts.split(","):
        parser.error("--parts: kill needs two devices or more")
    if args.tiny:
        args.layers, args.serve_layers, args.dispatch_layers = 3, 2, 2
    return args


def say(text: str) -> None:
    """Progress, with the time since the start of this process."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def saver(args: argparse.Namespace, part: str, machine: dict[str, str]) -> Callable[[dict[str, Any]], None]:
    """Writes a part's record whole, so that a run that is cut off keeps what it had."""
    sizes = {"tp": args.tp, "ep": args.ep, "attention_dp": args.attention_dp}
    file = args.out / f"multi_gpu_{part}.json"

    def save(record: dict[str, Any]) -> None:
        whole = {"machine": machine, **sizes, "wall_s": time.monotonic() - START, **record}
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)

    return save


def run_on_devices(args: argparse.Namespace, part: str) -> bool:
    """A part that this process's devices run; whether all was fine."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _MEMORY_FRACTION)  # has no argument in JAX
    if part == "parity":  # nothing is timed there
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_NO_TRIALS}"
    import jax

    if args.cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    from benchmarks.machine import describe_machine
    from benchmarks.multi_gpu.full_width import FULL, TINY, FullWidth
    from benchmarks.multi_gpu.parity import check_parity
    from benchmarks.multi_gpu.serving import serve_random
    from minimax_jax.parallel import ParallelConfig

    parallel = ParallelConfig(args.tp, args.ep, args.attention_dp)
    save = saver(args, part, describe_machine())
    if part == "parity":
        record = check_parity(
            parallel,
            tiny=args.tiny,
            new_tokens=4 if args.tiny else 32,
            say=say,
            save=save,
            deadline=START + args.limit_s - _ROW_S,
        )
        if record["left_out"]:
            say(f"  left out for want of time: {'; '.join(record['left_out'])}")
    elif part == "full":
        plan, deadline = TINY if args.tiny else FULL, START + args.limit_s - (0 if args.tiny else _COMPILE_S)
        bench = FullWidth(
            parallel, plan, weights=args.weights, layers=args.layers, say=say, save=save, deadline=deadline
        )
        record = {**bench.run(), "fine": True}
        if record["left_out"]:
            say(f"  left out for want of time: {'; '.join(record['left_out'])}")
        say(f"  {record['compiled']} executables were compiled")
    else:
        record = serve_random(
            parallel,
            seconds=args.minutes * 60,
            deadline=START + args.limit_s,
            layers=args.serve_layers,
            weights=args.weights,
            tiny=args.tiny,
            say=say,
            save=save,
        )
        say(
            f"  {record['requests']} requests in {record['seconds']:.0f} s, {record['tokens_per_s']:.0f} tokens/s, "
            f"{record['lost']} lost, memory {'flat' if record['flat'] else 'GREW'}"
        )
    save(record)
    return record["fine"]


def run_processes(args: argparse.Namespace, part: str) -> bool:
    """A part whose processes this one only starts."""
    from benchmarks.multi_gpu.ending import run_within
    from benchmarks.multi_gpu.launching import KILL_LIMIT, environment, kill_one, over_devices, said_of

    sizes, cpu = (args.tp, args.ep, args.attention_dp), args.cpu_devices is not None
    count, save = max(args.tp * args.attention_dp, args.ep), saver(args, part, {})
    if part == "kill":
        left = START + args.limit_s - time.monotonic()
        record = kill_one(sizes, count, args.out, begin_s=max(left - KILL_LIMIT, _BEGIN_S), cpu=cpu)
        say(f"  {said_of(record)}")
        save(record)
        return record["fine"]
    record, fine = {}, True
    for processes in dict.fromkeys((1, count)):
        name, left = f"processes_{processes}", START + args.limit_s - time.monotonic()
        if left < _LEAST_S:
            record[name] = {"error": "left out for want of time"}
            say(f"  {processes} processes: left out for want of time")
            fine &= processes > 1  # what was measured is fine, but nothing is not
            save({**record, "fine": fine})
            continue
        options = ["--layers", str(args.dispatch_layers), *(["--tiny", "--steps", "5"] if args.tiny else [])]
        file = args.out / f"dispatch_{processes}.json"
        command = over_devices(
            "benchmarks.multi_gpu.dispatch", [*options, "--out", str(file.resolve())], sizes, processes, cpu=cpu
        )
        with (args.out / f"dispatch_{processes}.err").open("w") as err:
            code = run_within(command, left, stdout=subprocess.DEVNULL, stderr=err, cwd=ROOT, env=environment())
        if code == 0:
            record[name] = found = json.loads(file.read_text(encoding="utf-8"))
            say(f"  {processes} processes: dispatch {found['dispatch_us']:.0f} us, step {found['step_us']:.0f} us")
        else:
            record[name], fine = {"error": "out of time" if code is None else f"status {code}, see {err.name}"}, False
            say(f"  {processes} processes: {record[name]['error']}")
        save({**record, "fine": fine})
    return fine


def run_all(args: argparse.Namespace, parts: list[str]) -> int:
    """Each part in a process of its own, which has all devices and leaves none of its memory behind."""
    from benchmarks.multi_gpu.ending import end_group, start_group

    failed, left_out = [], []
    for part in parts:
        left = START + args.limit_s - time.monotonic()
        if left < _LEAST_S:
            left_out.append(part)
            say(f"{part}: left out for want of time")
            continue
        limit = left if len(parts) == 1 else min(left, LIMITS[part] * (_CPU_PATIENCE if args.cpu_devices else 1))
        say(f"{part} (at most {limit:.0f} s) ...")
        child = start_group([sys.executable, *sys.argv, "--parts", part, "--limit-s", f"{limit:.0f}", "--as-part"])
        try:
            code = child.wait(limit + _GRACE)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(child)
        if code != 0:
            failed.append(part)
            say(f"{part}: {'hung, and was ended' if code is None else f'status {code}'}")
    fine = f"what ran is fine; left out: {', '.join(left_out)}" if left_out else "all is fine"
    say(f"failed: {', '.join(failed)}" if failed else fine)
    return int(bool(failed))


def main() -> int:
    """Runs the parts that were asked for."""
    args = arguments()
    from benchmarks.multi_gpu.ending import end_with_input, interrupt_on_signals

    parts = args.parts.split(",")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.as_part:
        end_with_input()
        run = run_processes if parts[0] in ("dispatch", "kill") else run_on_devices
        code = 0 if run(args, parts[0]) else 1
        sys.stdout.flush()
        os._exit(code)  # a return would wait for what is still being compiled on other threads
    interrupt_on_signals()
    try:
        return run_all(args, parts)
    except KeyboardInterrupt:
        say("interrupted; what was measured is in --out")
        return 130


if __name__ == "__main__":
    sys.exit(main())
