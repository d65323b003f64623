"""Several processes, each with devices of its own, that run one model together."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from minimax_jax.parallel.lifeline import INTERRUPTED, Ending, Lifeline

T = TypeVar("T")

LOST_PROCESS = 3  # exit code
VERDICT = 3.0  # seconds; a peer's end makes steps fail, and may be known only after that
_MEETING_BYTES = 4096
_ABORT_MARGIN = 30  # seconds
MEETING = 120  # seconds from when all have come until they watch each other; meanwhile devices start


@dataclasses.dataclass(frozen=True)
class ProcessesConfig:
    """How processes find each other, and when one counts as lost.

    Without a coordinator JAX asks the cluster: SLURM, Open MPI, or mpi4py.

    Attributes:
      coordinator: "host:port" of process 0, with a port that is free there; None to ask the cluster.
      num_processes, process_id: of the run, and this one's number from 0; given with the coordinator only.
      cluster: how JAX is to ask: "slurm", "ompi" or "mpi4py"; None for whichever there is.
      local_device_ids: accelerators of this host that this process uses; None for all, in SLURM and Open MPI jobs
        for the one with the process's number on its host.
      start_timeout: seconds that all processes have to come.
      peer_timeout: seconds of silence after which a process is lost. One that ends is missed at once.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    cluster: str | None = None
    local_device_ids: tuple[int, ...] | None = None
    start_timeout: int = 300
    peer_timeout: int = 20

    def __post_init__(self) -> None:
        given = {"num_processes": self.num_processes, "process_id": self.process_id}
        if self.coordinator is None:
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name} = {value}: only allowed with coordinator")
        else:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError(f"coordinator = {self.coordinator!r}: must be HOST:PORT")
            for name, value in given.items():
                if value is None:
                    raise ValueError(f"{name}: must be given with coordinator")
            if self.num_processes is not None and self.num_processes < 1:
                raise ValueError(f"num_processes = {self.num_processes}: must be at least 1")
            if not 0 <= (self.process_id or 0) < (self.num_processes or 1):
                raise ValueError(
                    f"process_id = {self.process_id}: must be within 0..{(self.num_processes or 1) - 1}, which "
                    f"num_processes = {self.num_processes} have"
                )
        for name in ("start_timeout", "peer_timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")


class Processes:
    """The processes of a run, seen from one of them. All call the same methods in the same order.

    Attributes:
      index, count: this process, and how many there are.
    """

    def __init__(self, index: int = 0, count: int = 1, lifeline: Lifeline | None = None):
        """One process alone by default; see `start_processes` for more."""
        self.index, self.count = index, count
        self._lifeline = lifeline

    @property
    def is_first(self) -> bool:
        """Whether this is process 0, which reads input and prints."""
        return self.index == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in process 0, where alone it is called; a JSON value, which all get as JSON has it."""
        if self._lifeline is None:
            return make()
        return self._lifeline.share(make() if self.is_first else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes; after an error the others are told and end with this process, which does not come out of here."""
        code = error.code if isinstance(error, SystemExit) else INTERRUPTED if kind is KeyboardInterrupt else 1
        if error is None or code in (0, None):
            self.close()
        elif self._lifeline is not None:
            traceback.print_exception(error)
            if not isinstance(error, (KeyboardInterrupt, SystemExit)):
                time.sleep(VERDICT)  # perhaps only because another process is gone, and then this one ends in here
            text = f"process {self.index}: {type(error).__name__}: {error}"
            self.leave(text, code if isinstance(code, int) else 1)

    def close(self) -> None:
        """Ends a run that went well, once all processes are here."""
        if self._lifeline is None:
            return
        self._lifeline.farewell()
        jax.distributed.shutdown()
        self._lifeline.close()
        self._lifeline = None

    def leave(self, text: str | None, code: int, printed: str | None = None) -> NoReturn:
        """Ends this process, and with it the others, which may wait for it on their devices: no way back.

        Args:
          text: why; process 0 prints it if another one says it. None if nothing is left to say.
          code: everybody's exit code.
          printed: what this process prints on stderr, unless another one has ended the run before.
        """
        if self._lifeline is not None and not self._lifeline.fail(Ending(text, code)):
            time.sleep(VERDICT)  # the process ends in here, with the other one's reason
        elif printed is not None:
            print(printed, file=sys.stderr)
        end_process(Ending(None, code))


def start_processes(config: ProcessesConfig, *, on_end: Callable[[Ending], None] | None = None) -> Processes:
    """Joins the other processes of a run; to be called before any device is used.

    CPU devices then talk over Gloo, GPUs over NCCL. From here on a lost process ends all (`on_end`).

    Args:
      on_end: what is done when the run must end; `end_process` if None.

    Raises:
      ValueError: if there is no cluster that JAX can ask, or the processes cannot reach each other.
      RuntimeError: from JAX, if a device was used already.
    """
    explicit = config.coordinator is not None
    on_end = end_process if on_end is None else on_end
    # JAX would abort with a stack trace
    whom = "the cluster names" if config.num_processes is None else f"num_processes = {config.num_processes} names"
    text = f"not all the processes that {whom} have come together within {config.start_timeout} s"
    where = "" if config.coordinator is None else f" at {config.coordinator}"
    waiting = _end_after(config.start_timeout, on_end, f"{text}{where}")
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            None if config.local_device_ids is None else list(config.local_device_ids),
            # with a coordinator nothing is asked: JAX would still take the devices from SLURM's variables
            cluster_detection_method="deactivate" if explicit else config.cluster,
            initialization_timeout=config.start_timeout + _ABORT_MARGIN,
            # the second net, should this process's threads be stuck
            heartbeat_timeout_seconds=2 * config.peer_timeout,
            shutdown_timeout_seconds=2 * config.peer_timeout,
        )
    except ValueError as error:
        waiting.cancel()
        if explicit:
            raise
        raise ValueError(
            f"no cluster to ask for the other processes ({error}): start with srun or mpirun, or give coordinator, "
            "num_processes and process_id"
        ) from None
    except BaseException:
        waiting.cancel()
        raise
    waiting.cancel()
    meeting = min(config.start_timeout, max(MEETING, config.peer_timeout))
    text = f"all processes have come, but did not meet within {meeting} s: one of them may hang at its devices"
    waiting = _end_after(meeting, on_end, text)
    hosts = [] if config.coordinator is None else [config.coordinator.rpartition(":")[0].strip("[]")]
    try:
        index, count = jax.process_index(), jax.process_count()
        if count == 1:
            return Processes()
        lifeline = Lifeline(
            index,
            count,
            _from_process_0,
            on_end,
            hosts=hosts,
            timeout=config.peer_timeout,
            lost_code=LOST_PROCESS,
        )
    except (OSError, RuntimeError) as error:  # until it stands, nobody else notices a process that is lost
        end_process(Ending(f"the processes could not meet: {error}", LOST_PROCESS))
    finally:
        waiting.cancel()
    return Processes(index, count, lifeline)


def _end_after(seconds: float, on_end: Callable[[Ending], None], text: str) -> threading.Timer:
    """Ends the run then, unless it is cancelled: this process's main thread may wait for another one that hangs."""
    timer = threading.Timer(seconds, on_end, (Ending(text, LOST_PROCESS),))
    timer.daemon = True
    timer.start()
    return timer


def end_process(ending: Ending) -> NoReturn:
    """Ends this process at once, whatever its threads wait for. No clean-up: JAX's would wait for the others."""
    if ending.text is not None:
        print(f"\nminimax-jax: error: {ending.text}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(ending.code)


def smallest_of_all(value: int) -> int:
    """The least of all processes' values, below 2**31, for what each measures and all must agree on."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).min())


def _from_process_0(text: str) -> str:
    data: Any = np.zeros(_MEETING_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode(), np.uint8)[:_MEETING_BYTES]
    data[: len(encoded)] = encoded
    shared = np.asarray(multihost_utils.broadcast_one_to_all(data))
    return bytes(shared[shared != 0]).decode()
