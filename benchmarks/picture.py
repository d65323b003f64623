"""The benchmark as a picture: our times as bars against vLLM's and the floor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.summary import Mean

OPS = ("score", "select", "index", "attention", "chain")


def draw(means: Sequence[Mean], title: str, path: Path) -> None:
    """One panel a group, one cluster of three bars an op (log scale: the ops differ by orders of magnitude)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(mean.group for mean in means if "batch 64" not in mean.group))
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.4 * rows), squeeze=False)
    for panel in axes.flat[len(groups) :]:
        panel.axis("off")
    for panel, group in zip(axes.flat, groups, strict=False):
        own = sorted((mean for mean in means if mean.group == group), key=lambda mean: OPS.index(mean.op))
        lowest = min(mean.floor_us for mean in own) / 2
        for position, mean in enumerate(own):
            bars = (
                ("vLLM 0.33", mean.vllm_us, "#b8b8b8"),
                ("this", mean.us, "#2166ac"),
                ("floor", mean.floor_us, "#7fbf7b"),
            )
            for offset, (label, value, color) in zip((-0.27, 0.0, 0.27), bars, strict=True):
                if value is not None:
                    panel.bar(position + offset, value - lowest, 0.26, bottom=lowest, color=color, label=label)
            ratio = f"{mean.ratio:.2f}x, " if mean.ratio else ""
            top = max(mean.us, mean.vllm_us or 0)
            panel.annotate(f"{ratio}{mean.floor_share:.0%}", (position, top * 1.12), ha="center", fontsize=8)
        panel.set_yscale("log")
        panel.set_ylim(lowest, panel.get_ylim()[1] * 2)
        panel.set_xticks(range(len(own)), [mean.op for mean in own])
        panel.set_title(group, fontsize=10)
        panel.set_ylabel("us a call")
    handles = dict(zip(*reversed(axes.flat[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="lower right", ncols=3, fontsize=8)
    figure.suptitle(f"{title}\nabove the bars: speed against vLLM, share of the floor", fontsize=11)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
