"""How generation runs its steps, and what "auto" chooses."""

from __future__ import annotations

EXECUTIONS = ("auto", "segmented", "whole", "eager")
# Below this many tokens a GPU is done with a segment before the host has sent the next one: segments take about three
# times as long as one executable at 64 tokens, 1.08 and 1.17 times at 1024, and the same time at 4096 (H100, H200,
# measured; docs/segmented.md). A pair of launches takes the host some 340 us, and 2048 tokens the device twice that.
LEAST_SEGMENTED_TOKENS = 2048
# On a CPU both take the same time once compiled. Segments share executables: the first token of 60 layers came after
# 7 s instead of 24, that of 6 layers after 3.2 instead of 2.9.
LEAST_SHARED_LAYERS = 12


def check_execution(execution: str) -> str:
    """The name, or ValueError for one that is not known."""
    if execution not in EXECUTIONS:
        raise ValueError(f"execution = {execution!r}: must be one of {', '.join(map(repr, EXECUTIONS))}")
    return execution


def prefill_execution(execution: str, num_tokens: int, num_layers: int, platform: str) -> str:
    """How to run a prefill step of `num_tokens` on a platform ("gpu", "cpu", ...): a name that is not "auto"."""
    if execution != "auto":
        return execution
    large = num_layers >= LEAST_SHARED_LAYERS if platform == "cpu" else num_tokens >= LEAST_SEGMENTED_TOKENS
    return "segmented" if large else "whole"


def mesh_execution(execution: str) -> str:
    """How to run the steps of a model that is spread over ranks: "auto" runs them whole.

    Segments pay where the device is slower than the host. A host launches every segment on all of its devices, so the
    sizes measured on one (`prefill_execution`) say nothing here; on several it was not measured.
    """
    return "whole" if execution == "auto" else execution
