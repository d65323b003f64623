"""The results of a rank's slice as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minimax_jax.rank_slice.cases import DECODE, Launching
from minimax_jax.rank_slice.kernel_classes import CLASSES

_KERNELS_SHOWN = 25
_DISTURBED = 1.1  # times a step's wall time, that profiled kernels cannot take unless the device was shared

_COLORS = (
    "#2166ac", "#4393c3", "#1b7837", "#5aae61", "#a6dba0", "#d9f0d3", "#bdbdbd", "#762a83", "#c2a5cf", "#fdae61",
)  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """For a terminal: each case against its floor and target, then where its time goes."""
    width = max([len(case["case"]) for case in report["cases"]], default=4)
    lines = [f"{'case':{width}}  ms a step  us a layer  floor, ms  x floor    MFU  bandwidth  target, ms  aim"]
    for case in report["cases"]:
        target = "" if case["target_ms"] is None else f"{case['target_ms']:.0f} {_verdict(case)}"
        lines.append(
            f"{case['case']:{width}}  {case['step_ms']:9.2f}  {case['layer_us']:10.1f}  {case['floor_ms']:9.2f}  "
            f"{case['times_floor']:7.2f}  {case['mfu']:5.1%}  {case['bandwidth_share']:9.1%}  "
            f"{target:>10}  {case['aim'] or ''}".rstrip()
        )
    for case in report["cases"]:
        shown = [
            f"{name} {part['us']:.0f} us" + (f" (floor {part['floor_us']:.0f})" if part["floor_us"] else "")
            for name in CLASSES
            if (part := case["classes"].get(name)) and part["us"] is not None
        ]
        lines.append(f"{case['case']}: " + (", ".join(shown) or "no profile of kernels on this device"))
        lines += [_launching_line(case)] if case["launchings"] else []
        lines += _kernel_lines(case)
        if case.get("temporaries") is not None:
            lines.append(f"  {case['temporaries'] / 1e6:.0f} MB beside weights and pages")
        if case.get("float_copies") is not None:
            lines.append(f"  {case['float_copies'] or 'no'} copies of quantised weights in floats are written")
        if case["compiling_beside"]:
            lines.append(f"  measured while {case['compiling_beside']} other steps compiled: the host was not quiet")
        if case["distinct_pages"] < 1:
            lines.append(
                f"  requests share pages: {case['distinct_pages']:.0%} of them are distinct, for want of memory"
            )
        if not case["finite"]:
            lines.append("  hidden states are no numbers: times may be others than a real model's")
    lines += [f"{name}: FAILED: {error}" for name, error in report["failed"].items()]
    if report["left_out"]:
        lines.append(f"left out for want of time: {'; '.join(report['left_out'])}")
    weights, peak = report["weights"], report.get("peak_bytes")
    lines.append(
        f"weights {weights['bytes'] / 1e9:.1f} GB in {weights['seconds']:.1f} s, pages "
        f"{report['pool_bytes'] / 1e9:.1f} GB" + ("" if peak is None else f", peak of the run {peak / 1e9:.1f} GB")
    )
    return "\n".join(lines)


def _launching_line(case: dict[str, Any]) -> str:
    """What a step takes in each way of launching it; the table has the least."""
    ways = [
        f"{one['step_ms']:.2f} ({Launching(one['steps'], one['graphs']).name}, +-{one['spread'] / 2:.0%})"
        for one in case["launchings"]
    ]
    ways += [f"{name} refused: {error[:80]}" for name, error in case["refused"].items()]
    return f"  ms a step: {'; '.join(ways)}"


def _kernel_lines(case: dict[str, Any]) -> list[str]:
    """The costliest kernels, and what is between kernels; nothing without a profile."""
    if case["gaps_us"] is None:
        return []
    lines = [f"  {case['gaps_us']:.0f} us a step without a kernel"]
    wall = 1e3 * case["step_ms"]
    if case["profiled_busy_us"] > _DISTURBED * wall:
        lines.append(
            f"  profiled steps were busy for {case['profiled_busy_us']:.0f} us, longer than a step's {wall:.0f} us: "
            "did other processes have the device too?"
        )
    if case["kind"] == DECODE:
        lines[0] += f"; {case['launches_a_layer']:.1f} launches a layer, those of the head included"
    lines.append("  us a step   calls  us a call  class        kernel")
    for row in case["kernels"][:_KERNELS_SHOWN]:
        name = row["kernel"] if row["module"] == "" else f"{row['kernel']} ({row['module']})"
        lines.append(f"  {row['us']:9.1f}  {row['calls']:6.1f}  {row['mean_us']:9.1f}  {row['class']:11}  {name}")
    return lines


def _verdict(case: dict[str, Any]) -> str:
    if case["step_ms"] <= case["target_ms"]:
        return "met"
    return "missed" if case["target_ms"] >= case["floor_ms"] else "< floor"


def draw(report: dict[str, Any], path: Path) -> Path | None:
    """Bars per case, stacked by class of kernel, with the floor and the target; None without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [kind for kind in ("decode", "prefill") if any(case["kind"] == kind for case in report["cases"])]
    if not kinds:
        return None
    figure, panels = plt.subplots(1, len(kinds), figsize=(8 * len(kinds), 4.6), squeeze=False)
    for panel, kind in zip(panels.flat, kinds, strict=True):
        own = [case for case in report["cases"] if case["kind"] == kind]
        for place, case in enumerate(own):
            left = 0.0
            for name, color in zip(CLASSES, _COLORS, strict=True):
                ms = ((case["classes"].get(name) or {}).get("us") or 0.0) / 1e3
                panel.barh(place, ms, left=left, color=color, label=name, height=0.6)
                left += ms
            panel.barh(
                place, max(0.0, case["step_ms"] - left), left=left, color="#eeeeee", height=0.6, label="no kernel"
            )
            panel.plot([case["floor_ms"]] * 2, [place - 0.4, place + 0.4], color="black", label="floor")
            if case["target_ms"] is not None:
                panel.plot([case["target_ms"]] * 2, [place - 0.4, place + 0.4], color="red", ls=":", label="target")
            end = max(left, case["step_ms"], case["target_ms"] or 0)
            panel.annotate(f" {case['times_floor']:.2f} x floor", (end, place), va="center", size=8)
        panel.set_yticks(range(len(own)), [case["case"] for case in own], size=8)
        panel.invert_yaxis()
        panel.set_xlabel("ms a step")
        panel.margins(x=0.15)
    handles: dict[str, Any] = {}
    for panel in panels.flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=7, fontsize=8)
    setting = report["setting"]
    figure.suptitle(
        f"{setting['device']}, one rank of TP {setting['tp']} EP {setting['ep']}, {setting['layers']} layers, "
        f"{setting['weights']}, {setting['routing']} routing, no collectives",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
    return path
