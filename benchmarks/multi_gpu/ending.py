"""How processes that a benchmark starts come to their end, whatever happens to either. Host code; imports no JAX."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

LAUNCHER_GRACE = 20.0  # seconds; scripts/launch.py gives its processes 12 before it kills them


def start_group(command: Sequence[str]) -> subprocess.Popen:
    """Starts a process in a group of its own, for `end_group`; its input ends with this process (`end_with_input`)."""
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def end_group(child: subprocess.Popen) -> None:
    """Ends what `start_group` started, and all that it has started: a moment to do it themselves, then at once."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)


def end_with_input() -> None:
    """Watches the standard input of a process from `start_group`; when it ends, kills the whole group.

    So a parent that was killed, and could end nothing itself, leaves no process that holds the devices.
    """

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def interrupt_on_signals() -> None:
    """SIGTERM and SIGHUP (a lost terminal) become KeyboardInterrupt; under nohup SIGHUP stays ignored."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def run_within(
    command: Sequence[str],
    seconds: float,
    *,
    stdout: IO[str] | int | None = None,
    stderr: IO[str] | int | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> int | None:
    """Runs a command, scripts/launch.py or another, for so many seconds at most.

    Returns:
      Its status; None if it was out of time, and was ended with the processes that it had started.
    """
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, cwd=cwd, env=env)
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_launcher(child)


def end_launcher(child: subprocess.Popen, grace: float = LAUNCHER_GRACE) -> None:
    """Ends a process and its children: by SIGTERM, upon which a launcher ends them, after `grace` seconds by force."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(grace)
    except subprocess.TimeoutExpired:
        for number, _ in children_of(child.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        child.kill()
        child.wait()


def children_of(parent: int) -> list[tuple[int, list[str]]]:
    """(id, command line) of a process's children."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            own_parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            argv = (folder / "cmdline").read_bytes().decode().split("\0")
        except (OSError, ValueError, IndexError):  # no process, or one that has ended meanwhile
            continue
        if own_parent == parent:
            found.append((int(folder.name), argv))
    return found
