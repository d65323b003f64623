"""Executables compiled side by side for as long as there is time."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

Key = TypeVar("Key")
_MOST_THREADS = 8


def side_by_side(tasks: Mapping[Key, Callable[[], Any]]) -> dict[Key, Any]:
    """What each task gives, once all are done; the error of one that fails."""
    if not tasks:
        return {}
    with concurrent.futures.ThreadPoolExecutor(_threads(tasks)) as threads:
        return dict(zip(tasks, threads.map(lambda task: task(), tasks.values()), strict=True))


def _threads(tasks: Mapping[Any, Any]) -> int:
    return min(_MOST_THREADS, len(tasks), os.cpu_count() or 1)


class Compiler:
    """Runs compilations on threads. Those that are not done in time go on, since XLA cannot stop them."""

    def __init__(self) -> None:
        self._late: set[concurrent.futures.Future[Any]] = set()

    @property
    def compiling(self) -> int:
        """How many compilations nobody waits for any more but still run."""
        self._late = {task for task in self._late if not task.done()}
        return len(self._late)

    def run(
        self, tasks: Mapping[Key, Callable[[], Any]], seconds: float
    ) -> Iterator[tuple[Key, concurrent.futures.Future[Any]]]:
        """Gives each task's key and finished future as it is done, those that take longer than `seconds` never."""
        if not tasks:
            return
        threads = concurrent.futures.ThreadPoolExecutor(_threads(tasks))
        waiting = {threads.submit(task): key for key, task in tasks.items()}
        try:
            for done in concurrent.futures.as_completed(waiting, timeout=max(0.0, seconds)):
                yield waiting[done], done
        except TimeoutError:
            pass
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            self._late |= {task for task in waiting if not task.done()}
