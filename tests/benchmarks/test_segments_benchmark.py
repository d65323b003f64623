"""The benchmark of segments: what it reads out of profiles, and its pictures and tables."""

import time
from types import SimpleNamespace

import pytest

from benchmarks.segments.report import summary
from benchmarks.segments.stopwatch import host_times
from benchmarks.segments.timeline import timeline_svg
from minimax_jax.rank_slice.trace import overlap, read_launches

EVENTS = [
    {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
    {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
    {"ph": "M", "pid": 1, "tid": 5, "name": "thread_name", "args": {"name": "Stream #5(Compute)"}},
    {"ph": "M", "pid": 1, "tid": 6, "name": "thread_name", "args": {"name": "Stream #6(Compute)"}},
    {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "XLA Ops"}},
    {"ph": "X", "pid": 1, "tid": 6, "name": "b", "ts": 14, "dur": 10},
    {"ph": "X", "pid": 1, "tid": 5, "name": "a_gemm", "ts": 10, "dur": 10},
    {"ph": "X", "pid": 1, "tid": 5, "name": "c", "ts": 30, "dur": 5},
    {"ph": "X", "pid": 1, "tid": 7, "name": "an op", "ts": 10, "dur": 99},
    {"ph": "X", "pid": 2, "tid": 5, "name": "host", "ts": 10, "dur": 99},
]


def test_kernels_of_the_device_alone_are_counted_and_their_overlap():
    launches = read_launches({"traceEvents": EVENTS})
    assert [launch.name for launch in launches] == ["a_gemm", "b", "c"]
    seen = overlap(launches)
    assert (seen.kernels, seen.streams, seen.added_us, seen.busy_us, seen.span_us) == (3, 2, 25, 19, 25)
    assert seen.overlapped_us == 6
    assert overlap([]) is None and read_launches({}) == []


def test_the_timeline_shows_every_kernel_in_its_stream():
    picture = timeline_svg({"one": read_launches({"traceEvents": EVENTS}), "none": []})
    assert picture.startswith("<svg") and picture.count("<title>") == 3 and "none" not in picture
    assert timeline_svg({}).startswith("<svg")


def test_the_table_leaves_out_what_was_not_run():
    setting = {"device": "d", "jax": "0", "layers": 2, "hidden": 8, "dtype": "float32", "past": 1}
    text = summary({"setting": setting, "seconds": {"model": 1.0}, "left_out": ["graphs"]})
    assert "left out for want of time: graphs" in text


def test_the_hosts_time_is_split_into_pairs_and_what_is_outside():
    passed = {"pairs": 0, "replay_seconds": 0.0, "boundary_seconds": 0.0}

    def run():
        for name, more in {"pairs": 4, "replay_seconds": 1e-3, "boundary_seconds": 4e-4}.items():
            passed[name] += more
        time.sleep(2e-3)  # of which the pairs took one

    found = host_times(run, SimpleNamespace(stats=lambda: SimpleNamespace(**passed)), steps=3)
    assert found["pair_us"] == pytest.approx(250) and found["boundary_us"] == pytest.approx(100)
    assert found["host_us"] >= 2000 and found["outside_us"] == pytest.approx(found["host_us"] - 1000)
