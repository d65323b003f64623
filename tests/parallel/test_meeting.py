"""A process that has come and then hangs at its devices holds the others up for MEETING seconds at most."""

import threading

import pytest

from minimax_jax.parallel import ProcessesConfig, processes


class Ended(BaseException):
    """In the place of a process's end."""


def end(ending):
    raise Ended(ending)


@pytest.mark.parametrize("comes", [True, False], ids=["hangs after it came", "never comes"])
def test_waiting_ends_with_a_word_about_what_is_missing(monkeypatch, comes):
    ended: list[processes.Ending] = []
    over = threading.Event()

    def on_end(ending):
        ended.append(ending)
        over.set()

    def hang(*_, **__):
        assert over.wait(20), "nobody ended the wait"
        raise RuntimeError("the device's end")

    monkeypatch.setattr(processes, "MEETING", 1 if comes else 100)
    monkeypatch.setattr(processes.jax.distributed, "initialize", (lambda *_, **__: None) if comes else hang)
    monkeypatch.setattr(processes.jax, "process_index", hang)
    monkeypatch.setattr(processes, "end_process", end)
    config = ProcessesConfig("localhost:1", 2, 0, start_timeout=100 if comes else 1, peer_timeout=1)
    with pytest.raises((RuntimeError, Ended)):
        processes.start_processes(config, on_end=on_end)
    (ending,) = ended
    assert ending.code == processes.LOST_PROCESS
    assert ("did not meet within 1 s" if comes else "come together within 1 s") in ending.text
