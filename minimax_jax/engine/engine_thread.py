"""The thread that runs the engine while there is work, and how other threads hand requests in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from minimax_jax.engine.core import EngineCore
from minimax_jax.engine.errors import EngineClosedError
from minimax_jax.engine.request import Request
from minimax_jax.engine.sequence import Sequence

Listener = Callable[[Request], None]


class EngineThread:
    """Runs an `EngineCore`; the core belongs to this thread alone until `close`."""

    def __init__(self, core: EngineCore, *, lockstep: bool = False):
        """
        Args:
          lockstep: whether other processes run the same steps. What is handed in then waits until all before it is
            done, since when it comes differs between the processes; and a request that is given up ends the engine.
        """
        self._core, self._lockstep = core, lockstep
        self._changed = threading.Condition()
        self._arrived: list[tuple[Request, Listener]] = []
        self._aborted: list[Request] = []
        self._live: dict[Sequence, tuple[Request, Listener]] = {}
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="minimax_jax engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Iterable[Request], listener: Listener) -> None:
        """Hands requests in, which the engine sees at once.

        Args:
          listener: called on the engine's thread whenever an answer grew or ended, and once for a request that has an
            error from the start. It must be quick.

        Raises:
          EngineClosedError: after `close`, or if the engine died.
        """
        with self._changed:
            self._check_open()
            self._arrived += [(request, listener) for request in requests]
            self._changed.notify()

    def abort(self, request: Request) -> None:
        """Ends a request; its listener hears of it. One that is done stays as it is."""
        with self._changed:
            if self._lockstep and not request.finished:
                self._closing = True
            self._aborted.append(request)
            self._changed.notify()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineClosedError(f"the engine died: {self._failure}") from self._failure
        if self._closing:
            raise EngineClosedError("the engine is closed: make a new LLM")

    def close(self) -> None:
        """Ends all requests and the thread; a second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait():
                self._tell(self._core.step())
        except Exception as error:  # noqa: BLE001 - every waiting caller must hear of it
            self._failure = error
        finally:
            with self._changed:
                self._closing = True
                told = (*self._live.values(), *self._arrived)
                left = {id(request): (request, listener) for request, listener in told}
                self._live.clear()
                self._arrived.clear()
            died = self._failure is not None
            what = f"died: {self._failure}" if died else "was closed"
            for request, listener in left.values():
                if not request.finished:
                    closed = EngineClosedError(f"the engine {what} before this request was done")
                    request.fail(closed, "error" if died else "abort")
                _listens(request, listener)

    def _wait(self) -> bool:
        """Takes in what came; returns whether to go on, once there is something to do."""
        with self._changed:
            while not (self._closing or self._arrived or self._aborted or self._core.busy):
                self._changed.wait()
            if self._lockstep and self._core.busy and not self._closing:
                return True
            arrived, aborted = self._arrived, self._aborted
            self._arrived, self._aborted = [], []
            if self._closing:
                self._arrived = arrived
                return False
        for request, listener in arrived:
            if request.finished:
                _listens(request, listener)
            for sequence in request.sequences:
                self._live[sequence] = (request, listener)
                self._core.add(sequence)
        for request in aborted:
            self._end(request)
        return True

    def _end(self, request: Request) -> None:
        for sequence in request.sequences:
            if not sequence.finished:
                self._core.abort(sequence)
                self._tell([sequence])

    def _tell(self, sequences: list[Sequence]) -> None:
        """Tells each listener once, whatever number of its answers have changed."""
        changed: dict[int, tuple[Request, Listener | None]] = {}
        for sequence in sequences:
            if sequence in self._live:
                request, listener = self._live[sequence]
                changed[id(request)] = request, listener
            if sequence.finished:
                self._live.pop(sequence, None)
        for request, told in changed.values():
            if told is not None and not _listens(request, told):
                for other in request.sequences:
                    self._live.pop(other, None)
                self._end(request)


def _listens(request: Request, listener: Listener) -> bool:
    """Tells a listener; False if it failed: whoever asked has gone away, which is no concern of other requests."""
    request.note_time()
    try:
        listener(request)
    except Exception:  # noqa: BLE001 - a closed event loop, a broken pipe, an error of the caller's own
        return False
    return True
