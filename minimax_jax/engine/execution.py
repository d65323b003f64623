"""How generation runs its steps, and what "auto" chooses."""

from __future__ import annotations

EXECUTIONS = ("auto", "segmented", "whole", "eager")
# Below this many tokens a GPU is done with a segment before the host has sent the next one: segments take about three
# times as long as one executable at 64 tokens, and the same time from 1024 on (H100, measured; docs/segmented.md).
LEAST_SEGMENTED_TOKENS = 1024


def check_execution(execution: str) -> str:
    """The name, or ValueError for one that is not known."""
    if execution not in EXECUTIONS:
        raise ValueError(f"execution = {execution!r}: must be one of {', '.join(map(repr, EXECUTIONS))}")
    return execution


def prefill_execution(execution: str, num_tokens: int, platform: str) -> str:
    """ "segmented", "whole" or "eager" for a prefill step of `num_tokens` on a platform ("gpu", "cpu", ...)."""
    if execution != "auto":
        return execution
    return "segmented" if platform != "cpu" and num_tokens >= LEAST_SEGMENTED_TOKENS else "whole"
