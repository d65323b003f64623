"""The processes' connections, in one process: who is missed, who is told, who is turned away."""

import queue
import socket
import threading
import time

import pytest

from minimax_jax.parallel.lifeline import Ending, Lifeline, Meeting


class Exchange:
    """Hands process 0's text to the others."""

    def __init__(self):
        self.text, self.there = "", threading.Event()

    def __call__(self, text):
        if text:
            self.text = text
            self.there.set()
        assert self.there.wait(10)
        return self.text


def connect(count, timeout=5.0):
    """(lifelines, queues of what each was told)."""
    exchange, lifelines, told = Exchange(), [None] * count, [queue.SimpleQueue() for _ in range(count)]

    def start(index):
        lifelines[index] = Lifeline(index, count, exchange, told[index].put, hosts=["127.0.0.1"], timeout=timeout)

    threads = [threading.Thread(target=start, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return lifelines, told


def close(lifelines):
    for lifeline in lifelines:
        lifeline.close()


def test_process_0s_value_reaches_all():
    lifelines, _ = connect(3)
    got = []
    threads = [threading.Thread(target=lambda x=x: got.append(x.share(None))) for x in lifelines[1:]]
    for thread in threads:
        thread.start()
    assert lifelines[0].share({"ids": [1, 2]}) == {"ids": [1, 2]}
    for thread in threads:
        thread.join(5)
    assert got == [{"ids": [1, 2]}] * 2
    close(lifelines)


def drop(lifeline):
    """What the operating system does to a dead process's connections."""
    lifeline._closing.set()
    for link in lifeline._links:
        link._connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_dead_process_is_missed_by_all_at_once(lost):
    lifelines, told = connect(3)
    drop(lifelines[lost])
    found = [told[index].get(timeout=2) for index in range(3) if index != lost]
    assert {ending.code for ending in found} == {3}
    texts = [ending.text for ending in found if ending.text is not None]
    assert len(texts) == (2 if lost == 0 else 1)  # process 0 says it, if it still can
    assert all(f"process {lost} of 3 (on " in text and "without a word" in text for text in texts)
    close(lifelines)


def test_a_silent_process_is_missed_after_the_timeout():
    lifelines, told = connect(2, timeout=1.0)
    lifelines[1]._closing.set()  # beats no more, and hears nothing
    begun = time.monotonic()
    assert "process 1 of 2" in (text := told[0].get(timeout=5).text) and "silent for 1 s" in text
    assert 0.5 < time.monotonic() - begun < 3
    close(lifelines)


def test_beats_keep_a_quiet_run_alive():
    lifelines, told = connect(2, timeout=0.5)
    time.sleep(1.5)
    assert told[0].empty() and told[1].empty()
    close(lifelines)


def test_a_failure_is_told_with_its_reason_and_code():
    lifelines, told = connect(3)
    lifelines[1].fail(Ending("no memory", 2))
    assert told[0].get(timeout=2).text.startswith("process 1 of 3 (on ") and told[1].empty()
    assert told[2].get(timeout=2) == Ending(None, 2)
    close(lifelines)


def test_of_two_that_fail_the_first_ones_reason_counts():
    lifelines, told = connect(2)
    assert lifelines[1].fail(Ending("no memory", 2))
    assert told[0].get(timeout=2).text.endswith("no memory")
    assert not lifelines[0].fail(Ending("no memory here either", 2))
    assert told[1].empty()
    close(lifelines)


def test_whoever_says_good_bye_is_not_missed():
    lifelines, told = connect(2)
    for lifeline in lifelines:
        lifeline.farewell()
    time.sleep(0.2)
    close(lifelines)
    time.sleep(0.2)
    assert told[0].empty() and told[1].empty()


def test_strangers_are_turned_away_and_who_is_missing_is_named():
    exchange = Exchange()

    def intrude():
        meeting = Meeting.decode(exchange(""))
        for words in (b'{"token": "guess"}\n', b"GET / HTTP/1.1\n", b"\xff\n", b"[1]\n"):
            with socket.create_connection(("127.0.0.1", meeting.port)) as connection:
                connection.sendall(words)
                connection.recv(1)

    stranger = threading.Thread(target=intrude)
    stranger.start()
    with pytest.raises(OSError, match="no connection from process 1 within 1 s"):
        Lifeline(0, 2, exchange, print, timeout=1.0)
    stranger.join(5)
    meeting = Meeting(("127.0.0.1",), Meeting.decode(exchange.text).port, "x")
    with pytest.raises(OSError, match="process 1 cannot reach process 0"):
        Lifeline(1, 2, lambda _: meeting.encode(), print, timeout=1.0)
