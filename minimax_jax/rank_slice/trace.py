"""Kernels on a device's time axis, from JAX's profiler."""

from __future__ import annotations

import dataclasses
import gzip
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel: name, stream, start and length in microseconds, its module if the profiler says it, its device."""

    name: str
    stream: str
    start: float
    length: float
    module: str = ""
    device: str = ""


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How busy the device was: kernels' times added up, time in which any ran, and from first to last."""

    kernels: int
    streams: int
    added_us: float
    busy_us: float
    span_us: float

    @property
    def overlapped_us(self) -> float:
        """Time saved by kernels that ran side by side."""
        return self.added_us - self.busy_us


def profile(run: Callable[[], Any]) -> list[Launch]:
    """The kernels of one call, after one that goes unseen; empty where the profiler shows none, as on a CPU."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run())
        files = sorted(Path(directory).rglob("*.trace.json.gz"))
        return read_launches(json.loads(gzip.decompress(files[-1].read_bytes()))) if files else []


def read_launches(trace: dict) -> list[Launch]:
    """Events on the streams of all devices."""
    devices, threads = {}, {}
    for event in trace.get("traceEvents", []):
        if event.get("ph") != "M":
            continue
        name = str(event.get("args", {}).get("name", ""))
        if event.get("name") == "process_name" and "GPU" in name:
            devices[event["pid"]] = name
        elif event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = name
    launches = [
        Launch(
            event["name"],
            thread,
            float(event["ts"]),
            float(event.get("dur", 0.0)),
            str(event.get("args", {}).get("hlo_module", "")),
            devices[event["pid"]],
        )
        for event in trace.get("traceEvents", [])
        if event.get("ph") == "X"
        and event.get("pid") in devices
        and "Stream" in (thread := threads.get((event["pid"], event["tid"]), ""))
    ]
    return sorted(launches, key=lambda launch: launch.start)


def typical_lengths(launches: Sequence[Launch], steps: int) -> list[Launch]:
    """The kernels with the median of the steps' lengths instead of their own.

    A kernel during which another process had the device seems to take milliseconds; as long as fewer than half of the
    steps met that at the same kernel, nothing of it is left. A kernel that not all steps ran equally often stays as
    it is.

    Args:
      launches: by start.
      steps: the same work over and over, in which they ran.
    """
    places: dict[tuple[str, str, str], list[int]] = {}
    for place, launch in enumerate(launches):
        places.setdefault((launch.device, launch.module, launch.name), []).append(place)
    lengths = [launch.length for launch in launches]
    for own in places.values():
        calls, rest = divmod(len(own), steps)
        for call in range(0 if rest else calls):
            same = own[call::calls]
            middle = statistics.median(lengths[place] for place in same)
            for place in same:
                lengths[place] = middle
    return [dataclasses.replace(launch, length=length) for launch, length in zip(launches, lengths, strict=True)]


def overlap(launches: list[Launch]) -> Overlap | None:
    """Whether kernels ran side by side; None without any."""
    if not launches:
        return None
    busy, end = 0.0, -1.0
    for launch in launches:
        stop = launch.start + launch.length
        busy += max(0.0, stop - max(launch.start, end))
        end = max(end, stop)
    return Overlap(
        len(launches),
        len({launch.stream for launch in launches}),
        sum(launch.length for launch in launches),
        busy,
        end - launches[0].start,
    )
