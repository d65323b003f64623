"""Arguments of `generate` and `bench` for several devices and several processes. Imports nothing heavy itself."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from minimax_jax.cli_arguments import integer, integers
from minimax_jax.cli_errors import BUG, outcome

if TYPE_CHECKING:
    from minimax_jax.parallel import ParallelConfig, Processes

OK = 0
_OPTIONS = "tensor is --tp, expert is --ep, attention_data is --attention-dp"
# what may differ between the processes of a run
_OWN = ("process_id", "local_device_ids", "out", "run")


def add_parallel(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    add = parser.add_argument_group("several devices (docs/parallel.md)").add_argument
    add("--tp", type=integer(1), default=1, metavar="N", help="ranks that share heads: 1, 2, 4 or 8 (default: 1)")
    add(
        "--ep",
        type=integer(1),
        metavar="N",
        help="ranks that routed experts are dealt to (default: 1; with --attention-dp all ranks)",
    )
    add(
        "--attention-dp",
        type=integer(1),
        default=1,
        metavar="N",
        help="groups of --tp ranks, each with requests of its own (default: 1)",
    )
    add(
        "--split-index-keys",
        action="store_true",
        help="ranks of a group keep and score a part of the index keys each; the same tokens (default: off)",
    )
    add(
        "--hosts",
        type=integer(1),
        default=1,
        metavar="N",
        help="hosts that the --attention-dp groups are on: tokens go between them once (default: 1, not told apart)",
    )
    add(
        "--all-to-all-tokens",
        type=integer(1),
        metavar="N",
        help="steps of N tokens or more, of all groups, send each only to the ranks of its experts (default: none)",
    )
    add(
        "--cpu-devices",
        type=integer(1),
        metavar="N",
        help="run on N simulated CPU devices in each process (default: the accelerators, or the CPU as one device)",
    )
    add = parser.add_argument_group(
        "several processes", "The same command in each; process 0 alone reads input and prints. See scripts/launch.py."
    ).add_argument
    add(
        "--distributed",
        nargs="?",
        const="auto",
        choices=("auto", "slurm", "ompi", "mpi4py"),
        help="one process of a SLURM (srun) or MPI (mpirun) job, which tells how many there are (default: alone)",
    )
    add("--coordinator", metavar="HOST:PORT", help="instead of that: where process 0 is (default: none)")
    add("--num-processes", type=integer(1), metavar="N", help="with --coordinator: how many (default: none)")
    add("--process-id", type=integer(0), metavar="I", help="with --coordinator: which one this is (default: none)")
    add(
        "--local-device-ids",
        type=integers(0),
        metavar="I,I",
        help="GPUs of its host that this process uses (default: all; with --distributed on SLURM and Open MPI the one "
        "with the process's number on its host)",
    )
    add("--start-timeout", type=integer(1), default=300, metavar="S", help="seconds for all to come (default: 300)")
    add(
        "--peer-timeout",
        type=integer(1),
        default=20,
        metavar="S",
        help="end all when a process was silent for so many seconds; at once when one has ended (default: 20)",
    )


def parallel_config(args: argparse.Namespace) -> ParallelConfig:
    """The sizes that were asked for.

    Raises:
      ParallelError: for sizes that do not fit each other.
    """
    from minimax_jax.parallel import ParallelConfig

    expert = args.ep
    if expert is None:
        expert = args.tp * args.attention_dp if args.attention_dp > 1 else 1
    return ParallelConfig(
        args.tp,
        expert,
        args.attention_dp,
        split_index_keys=args.split_index_keys,
        hosts=args.hosts,
        all_to_all_tokens=args.all_to_all_tokens,
    )


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[tuple[Processes, ParallelConfig]]:
    """The processes of this run, and the sizes that were asked for; in here all processes are alive, or none.

    With several, an error ends the whole run in here, with its exit code; it does not come out.

    Raises:
      ValueError: for arguments that do not go together, or differ between the processes.
      ParallelError: for sizes that do not fit each other, or the processes' devices.
    """
    import jax

    from minimax_jax.parallel import Processes, check_processes, start_processes

    config = _processes_config(args)
    if args.cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    if config is None:
        with _sizes_by_option():
            yield Processes(), parallel_config(args)
        return
    with _native_output_to_stderr():
        processes = start_processes(config)
        with _ending_together(processes), _sizes_by_option():
            _require_equal(args, processes)
            parallel = parallel_config(args)
            check_processes(parallel)
            yield processes, parallel
            processes.close()


@contextmanager
def _sizes_by_option() -> Iterator[None]:
    """Says which options the sizes are that a `ParallelError` names."""
    from minimax_jax.parallel import ParallelError

    try:
        yield
    except ParallelError as error:
        raise ParallelError(f"{error} ({_OPTIONS})") from None


@contextmanager
def _ending_together(processes: Processes) -> Iterator[None]:
    from minimax_jax.parallel.processes import VERDICT

    if processes.count == 1:
        yield
        return
    try:
        yield
    except BrokenPipeError:  # the reader of process 0's output has seen enough
        processes.leave(None, OK)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the other processes wait for this one
        text, code = outcome(error)
        if code == BUG:  # perhaps only because another process is gone, and then this one ends in here
            time.sleep(VERDICT)
        said = text.strip().removeprefix("minimax-jax: error: ")
        processes.leave(said, code, text if processes.is_first else None)


@contextmanager
def _native_output_to_stderr() -> Iterator[None]:
    """Keeps standard output for Python: Gloo, and NCCL when asked to, write there about their connections."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # replaced, by a test's or a notebook's
        yield
        return
    sys.stdout.flush()
    replaced, kept = sys.stdout, os.dup(number)
    os.dup2(sys.stderr.fileno(), number)
    sys.stdout = os.fdopen(kept, "w", encoding=replaced.encoding, errors="replace", closefd=False)
    try:
        yield
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os.dup2(kept, number)
        os.close(kept)
        sys.stdout = replaced


def _processes_config(args: argparse.Namespace) -> Any:
    """None for a process of its own."""
    from minimax_jax.parallel import ProcessesConfig

    if args.distributed is None and args.coordinator is None:
        for name in ("num_processes", "process_id", "local_device_ids"):
            if getattr(args, name) is not None:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option}: only allowed with --coordinator or --distributed")
        return None
    if args.distributed is not None and args.coordinator is not None:
        raise ValueError("--distributed: not allowed with --coordinator, which says everything itself")
    return ProcessesConfig(
        args.coordinator,
        args.num_processes,
        args.process_id,
        None if args.distributed == "auto" else args.distributed,
        args.local_device_ids,
        args.start_timeout,
        args.peer_timeout,
    )


def _require_equal(args: argparse.Namespace, processes: Processes) -> None:
    own = {name: str(value) for name, value in vars(args).items() if name not in _OWN}
    first = processes.from_first(lambda: own)
    for name, value in own.items():
        if first.get(name) != value:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} = {value}: must be {first.get(name)}, as in process 0")
