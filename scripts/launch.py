#!/usr/bin/env python3
"""Starts the processes of one run, on this host or on several, and ends all when one of them fails.

  python scripts/launch.py --processes 2 -- minimax-jax generate --tp 4 --cpu-devices 2 --prompt "The kernel"
  python scripts/launch.py --processes 8 --devices-per-process 1 -- minimax-jax bench --model DIR --tp 8 --ep 8
  python scripts/launch.py --hosts node1,node2 -- minimax-jax generate --model DIR --tp 8 --ep 16 --prompt "..."

or by hand, the same on every host with its own --node (as torchrun does it):

  python scripts/launch.py --nodes 2 --node 0 --coordinator node1:29400 -- minimax-jax generate ...

The command gets --coordinator, --num-processes and --process-id; process 0 alone has this script's standard input.
In SLURM and MPI jobs it is not needed: scripts/launch_slurm.sh, or mpirun minimax-jax ... --distributed ompi.
Exit status: that of the first process that failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

LOST_PROCESS = 3  # how a process ends that has lost another one (minimax_jax/parallel/processes.py)
POLL = 0.1


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one process runs.

    Attributes:
      process: its number in the run.
      local: its number on its host.
      host: to reach by ssh; None for this one.
    """

    process: int
    local: int
    host: str | None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--processes", type=int, default=1, metavar="N", help="on each host (default: 1, with all of its devices)")
    add("--devices-per-process", type=int, metavar="N", help="GPUs that each takes, in order (default: all)")
    add("--hosts", metavar="HOST,HOST", help="start on these by ssh, in this directory (default: here)")
    add("--ssh", default="ssh -o BatchMode=yes", metavar="COMMAND", help="how hosts are reached (default: %(default)s)")
    add("--nodes", type=int, default=1, metavar="N", help="hosts, each with a launch.py of its own (default: 1)")
    add("--node", type=int, default=0, metavar="I", help="with --nodes: which of them this is (default: 0)")
    add("--coordinator", metavar="HOST:PORT", help="process 0 (default: the first host, and a port that is free here)")
    add("--grace", type=float, default=10, metavar="S", help="when one fails, seconds for the others (default: 10)")
    add("command", nargs=argparse.REMAINDER, help="-- and the command")
    args = parser.parse_args()
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        parser.error("no command: give it after --")
    for name, least in (("processes", 1), ("nodes", 1), ("devices_per_process", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} = {getattr(args, name)}: must be at least {least}")
    if args.devices_per_process is None and args.processes > 1 and not _on_cpu(args.command):
        parser.error("--devices-per-process: must be given, or several processes of one host would take the same GPUs")
    if not 0 <= args.node < args.nodes:
        parser.error(f"--node = {args.node}: must be within 0..{args.nodes - 1}")
    if args.nodes > 1 and (args.hosts or not args.coordinator):
        parser.error("--nodes: must come with --coordinator and without --hosts")
    return args


def _on_cpu(command: list[str]) -> bool:
    return any(word.partition("=")[0] == "--cpu-devices" for word in command)


def places(args: argparse.Namespace) -> list[Place]:
    """The processes that this script starts."""
    hosts = args.hosts.split(",") if args.hosts else [None]
    first = args.node * args.processes
    return [
        Place(first + number * args.processes + local, local, host)
        for number, host in enumerate(hosts)
        for local in range(args.processes)
    ]


def free_port() -> int:
    """A port that was free here a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def command_of(place: Place, args: argparse.Namespace, coordinator: str) -> list[str]:
    """What to run for one process."""
    total = args.processes * (args.nodes if not args.hosts else len(args.hosts.split(",")))
    command = [*args.command, "--coordinator", coordinator, "--num-processes", str(total)]
    command += ["--process-id", str(place.process)]
    if args.devices_per_process is not None:
        first = place.local * args.devices_per_process
        command += ["--local-device-ids", ",".join(map(str, range(first, first + args.devices_per_process)))]
    if place.host is None:
        return command
    here, tools = shlex.quote(str(Path.cwd())), shlex.quote(str(Path(sys.executable).parent))
    run = f"exec {shlex.join(command)}" if place.process == 0 else _ENDED_WITH_INPUT.format(shlex.join(command))
    return [*shlex.split(args.ssh), place.host, f"cd {here} && export PATH={tools}:$PATH && {{ {run}; }}"]


# ssh ends no remote command: this one is killed when its input ends, as it does when ssh or this script is gone
_ENDED_WITH_INPUT = (
    "exec 3<&0; {} 3<&- </dev/null & run=$!; {{ cat <&3 >/dev/null; kill $run 2>/dev/null; }} & wait $run; code=$?; "
    "kill $! 2>/dev/null; exit $code"
)


def end(running: list[subprocess.Popen], grace: float) -> None:
    """Ends what still runs: a moment to do it themselves, with a message, then by signals."""
    for wait, number in ((grace, signal.SIGTERM), (2.0, signal.SIGKILL)):
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and any(process.poll() is None for process in running):
            time.sleep(POLL)
        for process in running:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    process.send_signal(number)
    for process in running:
        process.wait()


def watch(running: list[subprocess.Popen]) -> tuple[int, int] | None:
    """Waits for all; (place in the list, exit status) of the first that fails."""
    while True:
        codes = [process.poll() for process in running]
        failed = [(number, code) for number, code in enumerate(codes) if code]
        if failed:  # whoever ended because another one was lost is not the first
            return min(failed, key=lambda found: found[1] == LOST_PROCESS)
        if None not in codes:
            return None
        time.sleep(POLL)


def main() -> int:
    """Runs all processes."""
    args = arguments()
    host = args.hosts.split(",")[0] if args.hosts else "127.0.0.1"
    coordinator = args.coordinator or f"{host}:{free_port()}"
    # `minimax-jax` lies beside the Python that runs this, whether or not that is on the path
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    running: list[subprocess.Popen] = []
    failed, status = None, 0
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        for place in places(args):
            command = command_of(place, args, coordinator)
            watched = place.host is not None and place.process != 0
            stdin = None if place.process == 0 else subprocess.PIPE if watched else subprocess.DEVNULL
            running.append(subprocess.Popen(command, stdin=stdin, env=environment))
        failed = watch(running)
    except OSError as error:
        print(f"launch.py: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:  # the terminal has sent it to all processes of this host
        status = 130
    try:
        if failed is not None or status:
            end(running, args.grace)
    except KeyboardInterrupt:  # a second time: at once
        status = 130
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
    if failed is None:
        return status
    number, code = failed
    shown = f"signal {-code}" if code < 0 else f"status {code}"
    print(f"launch.py: process {places(args)[number].process} ended first, with {shown}", file=sys.stderr)
    return 128 - code if code < 0 else code


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
