"""How much of a step its collectives take, from the kernels that a profile shows."""

from __future__ import annotations

import collections
import re
import statistics
from collections.abc import Sequence
from typing import Any

from minimax_jax.rank_slice.trace import Launch, overlap

# NCCL's kernels; and those that XLA makes itself for small sums and exchanges, which it names after the instruction,
# and that after the primitive it came from: a sum of a decode step is "psum_119_0_fusion_1"
_COLLECTIVE = re.compile(
    r"nccl|all.?reduce|all.?gather|reduce.?scatter|all.?to.?all|collective|multimem|(?<![a-z])(psum|pmax|pmin|ppermute)",
    re.IGNORECASE,
)
_SHOWN = 12


def is_collective(name: str) -> bool:
    """Whether a kernel is a collective's, by its name in a profile."""
    return _COLLECTIVE.search(name) is not None


def collective_share(launches: Sequence[Launch]) -> dict[str, Any] | None:
    """Collectives' part of a step. A collective's kernel also waits in there for the ranks that come late.

    Returns:
      None where the profile shows no kernels. Else, in microseconds: "span_us" from first kernel to last and "busy_us"
      in which any ran (means of the devices), "collective_us" added up on each device: the mean, and "least_us" on
      the device that waits least; "alone_us", of the mean, while nothing else ran; "share" = collective_us / span_us,
      "count" of them on a device; "kernels": the names that take most, added up on the first device.
    """
    by_device: dict[str, list[Launch]] = {}
    for launch in launches:
        by_device.setdefault(launch.device, []).append(launch)
    if not by_device:
        return None
    spans, busy, taken, alone, counts = [], [], [], [], []
    for own in by_device.values():
        whole = overlap(own)
        rest = overlap([launch for launch in own if not is_collective(launch.name)])
        found = [launch for launch in own if is_collective(launch.name)]
        assert whole is not None
        spans.append(whole.span_us)
        busy.append(whole.busy_us)
        taken.append(sum(launch.length for launch in found))
        alone.append(whole.busy_us - (0.0 if rest is None else rest.busy_us))
        counts.append(len(found))
    by_name: dict[str, float] = collections.defaultdict(float)
    for launch in next(iter(by_device.values())):
        by_name[launch.name] += launch.length
    span, collective = statistics.mean(spans), statistics.mean(taken)
    return {
        "span_us": span,
        "busy_us": statistics.mean(busy),
        "collective_us": collective,
        "least_us": min(taken),
        "alone_us": statistics.mean(alone),
        "share": collective / span if span else 0.0,
        "count": max(counts),
        "kernels": dict(sorted(by_name.items(), key=lambda item: -item[1])[:_SHOWN]),
    }
