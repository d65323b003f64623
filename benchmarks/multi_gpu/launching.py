"""Runs of one or several processes, and what happens to them when one of them is killed. Host code; imports no JAX."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.multi_gpu.ending import children_of, end_launcher

ROOT = Path(__file__).resolve().parents[2]
KILL_LIMIT = 60  # seconds in which the others must end
_LAUNCH = (sys.executable, str(ROOT / "scripts" / "launch.py"))
_PROMPT = "And it came to pass, that the kernel"


def environment() -> dict[str, str]:
    """This repository's packages, wherever the commands run."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def over_devices(
    module: str, arguments: Sequence[str], sizes: tuple[int, int, int], processes: int, *, cpu: bool
) -> list[str]:
    """The command `python -m module` with a layout, in so many processes.

    Args:
      module: takes `minimax-jax`'s arguments for several devices.
      sizes: tensor, expert, attention_data.
      cpu: whether devices are simulated.
    """
    tensor, expert, data = sizes
    each = max(tensor * data, expert) // processes
    command = [sys.executable, "-m", module, *arguments]
    command += ["--tp", str(tensor), "--ep", str(expert), "--attention-dp", str(data)]
    if cpu:
        command += ["--cpu-devices", str(each)]
    if processes == 1:
        return command
    devices = [] if cpu else ["--devices-per-process", str(each)]
    return [*_LAUNCH, "--processes", str(processes), *devices, "--", *command]


def process_of(launcher: int, number: str) -> int:
    """The id of one of the launcher's processes.

    Raises:
      ProcessLookupError: if there is none.
    """
    for process, argv in children_of(launcher):
        if "--process-id" in argv and argv[argv.index("--process-id") + 1] == number:
            return process
    raise ProcessLookupError(f"process {number} of the run")


def kill_one(
    sizes: tuple[int, int, int],
    processes: int,
    out: Path,
    *,
    begin_s: float,
    cpu: bool,
    model: str = "tiny",
    tokens: int = 3000,
) -> dict[str, Any]:
    """Kills the last process of a long generation, and times the others' end.

    Args:
      out: a folder, for what they say (kill.err).
      begin_s: seconds in which tokens must come.

    Returns:
      As `kill_and_wait`.
    """
    arguments = ["generate", "--prompt", _PROMPT, "--max-new-tokens", str(tokens), "--temperature", "0"]
    arguments += ["--ignore-eos", "--model", model]
    command = over_devices("minimax_jax", arguments, sizes, processes, cpu=cpu)
    return kill_and_wait(command, processes, out / "kill.err", begin_s=begin_s, end_s=KILL_LIMIT)


def kill_and_wait(command: Sequence[str], processes: int, log: Path, *, begin_s: float, end_s: float) -> dict[str, Any]:
    """Starts scripts/launch.py, kills the last of its processes when they write, and waits for the others.

    Args:
      command: the launcher's, with so many `processes`.
      log: a file for their standard error.
      begin_s, end_s: seconds until they write, and from the kill until all are gone; then they are ended.

    Returns:
      "seconds" from the kill until all were gone (None: none was killed), whether the lost one was "named" on standard
      error, what went "wrong" (None: nothing), and whether all that is "fine".
    """
    number, seconds, wrong = str(processes - 1), None, None
    with log.open("w+") as err:
        started = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err, env=environment()
        )
        assert started.stdout is not None
        try:
            if not select.select([started.stdout], [], [], max(begin_s, 0))[0]:
                wrong = f"no token in {begin_s:.0f} s"
            elif not os.read(started.stdout.fileno(), 1):
                wrong = "ended before the first token"
            else:
                killed = time.monotonic()
                os.kill(process_of(started.pid, number), signal.SIGKILL)
                started.communicate(timeout=end_s)
                seconds = time.monotonic() - killed
        except ProcessLookupError:
            wrong = "ended before one was killed"
        except subprocess.TimeoutExpired:
            wrong = f"some were left {end_s:.0f} s after one was killed"
        finally:
            end_launcher(started)
            started.stdout.close()
        err.seek(0)
        named = f"process {number} of {processes}" in err.read()
    fine = wrong is None and named
    return {"seconds": seconds, "named": named, "wrong": wrong and f"{wrong}, see {log}", "fine": fine}


def said_of(record: dict[str, Any]) -> str:
    """What `kill_one` has found, in words."""
    if record["wrong"]:
        return record["wrong"]
    return f"the others ended after {record['seconds']:.1f} s; named: {record['named']}"
