"""Connections by which the processes of a run notice that one of them is gone: sockets, threads, no JAX.

Every process holds one connection to process 0. An operating system closes a dead process's connections at once, and a
process or host that hangs stops sending beats; either way all others hear of it, though their main threads wait for a
device that waits for the dead one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

INTERRUPTED = 130
_BEATS = 5  # within a timeout
_HELLO = 3.0  # seconds for a new connection to say who it is
_INTERRUPT_GRACE = 2.0  # seconds; Ctrl-C mostly reaches all processes, which then end by themselves


@dataclasses.dataclass(frozen=True)
class Ending:
    """Why a run ends early.

    Attributes:
      text: for whoever reads this process's messages; None if another process says it.
      code: the exit code that follows.
    """

    text: str | None
    code: int


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where process 0 waits for the others.

    Attributes:
      hosts: names and addresses to try, in order; port: one for all of them.
      token: what the others must know, so that strangers are turned away.
    """

    hosts: tuple[str, ...]
    port: int
    token: str

    def encode(self) -> str:
        """As text, for whatever way there is to the other processes."""
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def decode(cls, text: str) -> Meeting:
        """From `encode`'s text."""
        hosts, port, token = json.loads(text)
        return cls(tuple(hosts), port, token)


class _Link:
    """One connection, over which JSON objects go, one a line."""

    def __init__(self, connection: socket.socket, process: int, host: str, timeout: float):
        connection.settimeout(timeout)
        self.process, self.host = process, host
        self.done = False  # whether the other side said good-bye
        self._connection, self._lines = connection, connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        with self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None when the connection was closed, TimeoutError when nothing came."""
        line = self._lines.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


class Lifeline:
    """This process's connections: to process 0, or to all others if this is it.

    Attributes:
      index, count: this process, and how many there are.
    """

    def __init__(
        self,
        index: int,
        count: int,
        exchange: Callable[[str], str],
        on_end: Callable[[Ending], None],
        *,
        hosts: Sequence[str] = (),
        timeout: float = 20.0,
        lost_code: int = 3,
    ):
        """Connects all processes; each must call.

        Args:
          exchange: gives every process the text that process 0 passes.
          on_end: called once, on a thread, when the run must end: a process is lost, or one said that it failed.
          hosts: what others may reach process 0 by, beside its own name.
          timeout: seconds of silence after which a process counts as lost; also what connecting may take.
          lost_code: the exit code for a lost process.

        Raises:
          OSError: if process 0 cannot be reached, or somebody does not come.
        """
        self.index, self.count = index, count
        self._on_end, self._timeout, self._lost_code = on_end, timeout, lost_code
        self._shared: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._closing, self._ending = threading.Event(), threading.Lock()
        self._links = self._accept(exchange, hosts) if index == 0 else [self._connect(Meeting.decode(exchange("")))]
        for link in self._links:
            threading.Thread(target=self._listen, args=(link,), name="minimax_jax lifeline", daemon=True).start()
        threading.Thread(target=self._beat, name="minimax_jax beats", daemon=True).start()

    def share(self, value: Any) -> Any:
        """Gives every process the JSON value that process 0 passes; the others wait for it."""
        if self.index != 0:
            return self._shared.get()
        for link in self._links:
            try:
                link.send(share=value)
            except OSError as error:  # no broken pipe of an output: whoever listens ends this process
                raise RuntimeError(f"process {link.process} on {link.host} is gone") from error
        return value

    def fail(self, ending: Ending) -> bool:
        """Tells the others that this process ends, and why.

        Returns:
          False if another process has ended the run before: its reason counts, and `on_end` is at it.
        """
        if not self._ending.acquire(blocking=False):
            return False
        self._closing.set()
        for link in self._links:
            with contextlib.suppress(OSError):
                link.send(end=ending.text, code=ending.code)
        return True

    def farewell(self) -> None:
        """Tells the others that this process is done: it may go without being missed."""
        for link in self._links:
            with contextlib.suppress(OSError):
                link.send(bye=True)

    def close(self) -> None:
        """Closes the connections; nothing is watched any more."""
        self._closing.set()
        for link in self._links:
            link.close()

    def _accept(self, exchange: Callable[[str], str], hosts: Sequence[str]) -> list[_Link]:
        token = secrets.token_hex(8)
        links: list[_Link] = []
        with _listener() as listener:
            listener.listen(self.count)
            exchange(Meeting((*hosts, *_own_names()), listener.getsockname()[1], token).encode())
            deadline = time.monotonic() + self._timeout
            while len(links) < self.count - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    missing = sorted(set(range(1, self.count)) - {link.process for link in links})
                    raise OSError(
                        f"no connection from process {', '.join(map(str, missing))} within {self._timeout:g} s: can "
                        "the hosts reach each other?"
                    ) from None
                link = _Link(connection, -1, "", self._timeout)
                connection.settimeout(min(_HELLO, self._timeout))
                hello: Any = None
                with contextlib.suppress(OSError, ValueError):  # a stranger may say anything, or nothing
                    hello = link.receive()
                connection.settimeout(self._timeout)
                if not isinstance(hello, dict) or hello.get("token") != token:
                    link.close()
                    continue
                link.process, link.host = hello["process"], hello["host"]
                link.send(host=socket.gethostname())
                links.append(link)
        return links

    def _connect(self, meeting: Meeting) -> _Link:
        for host in meeting.hosts:
            try:
                connection = socket.create_connection((host, meeting.port), self._timeout / len(meeting.hosts))
            except OSError:
                continue
            link = _Link(connection, 0, host, self._timeout)
            link.send(token=meeting.token, process=self.index, host=socket.gethostname())
            answer = link.receive()
            if answer is not None:
                link.host = answer["host"]
                return link
        names = ", ".join(meeting.hosts)
        raise OSError(f"process {self.index} cannot reach process 0 at port {meeting.port} of any of {names}")

    def _beat(self) -> None:
        while not self._closing.wait(self._timeout / _BEATS):
            for link in self._links:
                with contextlib.suppress(OSError):  # the listening thread says that it is gone
                    link.send()

    def _listen(self, link: _Link) -> None:
        who = f"process {link.process} of {self.count} (on {link.host})"
        while not self._closing.is_set():
            try:
                message = link.receive()
            except TimeoutError:
                return self._end(link, Ending(f"{who} was lost: silent for {self._timeout:g} s", self._lost_code))
            except (OSError, ValueError):
                message = None
            if message is None:
                if not link.done:
                    self._end(link, Ending(f"{who} was lost: it has ended without a word", self._lost_code))
                return None
            if "share" in message:
                self._shared.put(message["share"])
            elif "bye" in message:
                link.done = True
            elif "end" in message:
                if message["code"] == INTERRUPTED:
                    time.sleep(_INTERRUPT_GRACE)
                text = message["end"]
                # what process 0 says it has printed itself
                text = f"{who}: {text}" if self.index == 0 and text is not None else None
                return self._end(link, Ending(text, message["code"]))
        return None

    def _end(self, source: _Link, ending: Ending) -> None:
        if self._closing.is_set() or not self._ending.acquire(blocking=False):  # the first one counts
            return
        for link in self._links:
            if link is not source:
                with contextlib.suppress(OSError):
                    link.send(end=ending.text, code=ending.code)
        self._on_end(ending)


def _listener() -> socket.socket:
    """On any free port, for IPv4 and, where there is such a thing, IPv6."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _own_names() -> tuple[str, ...]:
    name = socket.gethostname()
    names = [name, socket.getfqdn()]
    with contextlib.suppress(OSError):
        names += [str(info[4][0]) for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    return tuple(dict.fromkeys(names))
