"""Which part of the model a kernel on the device's time axis belongs to, by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from minimax_jax.rank_slice.trace import Launch

# in the order in which pictures stack them
CLASSES = (
    "matmul", "experts", "score", "select", "attend", "write", "elementwise", "head", "sampling", "copies",
)  # fmt: skip
# the first pattern that is found decides; kernels of ours have the names that `triton_call` is given
_PATTERNS = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("experts", r"grouped_matmul|routed_expert|expert|(combine|gather|cut)_rows|_pairs|sort|radix|scatter|moe"),
        ("score", r"index_score"),
        ("select", r"select_blocks|topk|top_k"),
        ("attend", r"attention|merge_partials"),
        ("write", r"write_pages"),
        ("matmul", r"matmul|sum_splits|router_logits|gemm|gemv|nvjet|cublas|cutlass|xmma|splitk|_dot"),
        ("copies", r"memcpy|memset|copy"),
    )
)
_PICK = re.compile(r"pick|take")  # the module that makes logits and chooses tokens, and the one before it
_ATTENTION = re.compile(r"(dense|sparse)_layer\b")  # the modules behind the attention boundary


def kernel_class(launch: Launch) -> str:
    """One of `CLASSES`.

    The router's product is with "matmul", as its bytes are in `step_work`; its choice and the sorting of pairs with
    "experts". `add_norm`, `norm_rope`, `sum_norm_rope` and whatever no pattern names, XLA's own fusions, are
    "elementwise". Sorts behind the attention boundary, of pairs of queries and pages, are "attend". Of the module that
    makes logits and chooses tokens, products are the "head", and all else is "sampling".
    """
    name = launch.name.lower()
    found = next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "elementwise")
    if found == "experts" and _ATTENTION.search(launch.module):
        return "attend"
    if not _PICK.search(launch.module):
        return found
    return "head" if found == "matmul" else "sampling"


def class_times(launches: Sequence[Launch]) -> dict[str, float]:
    """Microseconds by class, those without a kernel left out; kernels that run side by side count each."""
    times: dict[str, float] = {}
    for launch in launches:
        kind = kernel_class(launch)
        times[kind] = times.get(kind, 0.0) + launch.length
    return {kind: times[kind] for kind in CLASSES if kind in times}


def kernel_table(launches: Sequence[Launch], steps: int) -> list[dict[str, object]]:
    """Kernels, costliest first: name, class, module, calls a step, mean microseconds of a call and all of a step's.

    Args:
      steps: in which they ran.
    """
    found: dict[tuple[str, str], list[Launch]] = {}
    for launch in launches:
        # the numbers of XLA's fusions say nothing
        found.setdefault((re.sub(r"[._]\d+$", "", launch.name), launch.module), []).append(launch)
    rows: list[dict[str, object]] = [
        {
            "kernel": name,
            "class": kernel_class(own[0]),
            "module": module,
            "calls": len(own) / steps,
            "mean_us": sum(launch.length for launch in own) / len(own),
            "us": sum(launch.length for launch in own) / steps,
        }
        for (name, module), own in found.items()
    ]
    return sorted(rows, key=lambda row: -float(str(row["us"])))
