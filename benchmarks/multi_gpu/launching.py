"""Runs of one or several processes, and what happens to them when one of them is killed. Host code; imports no JAX."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            argv = (folder / "cmdline").read_bytes().decode().split("\0")
        except (OSError, ValueError, IndexError):  # no process, or one that has ended meanwhile
            continue
        if parent == launcher and "--process-id" in argv and argv[argv.index("--process-id") + 1] == number:
            return int(folder.name)
    raise ProcessLookupError(f"process {number} of the run")


def kill_one(
    sizes: tuple[int, int, int], processes: int, out: Path, *, cpu: bool, model: str = "tiny", tokens: int = 3000
) -> dict[str, Any]:
    """Kills the last process of a long generation, and times the others' end.

    Args:
      out: a folder, for what they say (kill.err).

    Returns:
      "seconds" until all were gone, whether the lost one was "named", and whether all that is "fine".
    """
    arguments = ["generate", "--prompt", _PROMPT, "--max-new-tokens", str(tokens), "--temperature", "0"]
    arguments += ["--ignore-eos", "--model", model]
    number = str(processes - 1)
    with (out / "kill.err").open("w+") as err:
        started = subprocess.Popen(
            over_devices("minimax_jax", arguments, sizes, processes, cpu=cpu),
            stdout=subprocess.PIPE,
            stderr=err,
            env=environment(),
        )
        try:
            assert started.stdout is not None
            begun = started.stdout.read(1)  # tokens come
            at = time.monotonic()
            os.kill(process_of(started.pid, number), signal.SIGKILL)
            started.communicate(timeout=KILL_LIMIT)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if started.poll() is None:
                started.send_signal(signal.SIGINT)
                started.communicate()
        seconds = time.monotonic() - at
        err.seek(0)
        named = f"process {number} of {processes}" in err.read()
    return {"seconds": seconds, "named": named, "fine": bool(begun) and named and seconds < KILL_LIMIT}
