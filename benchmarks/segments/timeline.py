"""Steps as bars on a time axis, an SVG image."""

from __future__ import annotations

from collections.abc import Mapping
from xml.sax.saxutils import escape

from minimax_jax.rank_slice.trace import Launch

_KINDS = (
    ("matrix products", ("gemm", "cublas", "nvjet", "cutlass", "dot"), "#4e79a7"),
    ("attention and cache", ("attend", "score", "select", "write", "merge", "sparse", "msa", "pages"), "#e15759"),
    ("copies", ("memcpy", "memset", "copy"), "#bab0ac"),
    ("other fusions", ("",), "#76b7b2"),
)
_WIDTH = 1500


def timeline_svg(steps: Mapping[str, list[Launch]]) -> str:
    """One band a step, one row a stream; all bands have one scale."""
    steps = {name: launches for name, launches in steps.items() if launches}
    longest = max(
        (launches[-1].start + launches[-1].length - launches[0].start for launches in steps.values()), default=1
    )
    parts, y = [], 30
    for name, launches in steps.items():
        streams = sorted({launch.stream for launch in launches})
        origin = launches[0].start
        parts.append(f'<text x="10" y="{y}">{escape(name)}: {len(launches)} kernels</text>')
        for launch in launches:
            x = 10 + (launch.start - origin) / longest * _WIDTH
            row = y + 8 + streams.index(launch.stream) * 22
            _, _, colour = next(k for k in _KINDS if any(word in launch.name.lower() for word in k[1]))
            width = max(launch.length / longest * _WIDTH, 0.2)
            title = f"<title>{escape(launch.name)}: {launch.length:.1f} us</title>"
            parts.append(f'<rect x="{x:.2f}" y="{row}" width="{width:.2f}" height="18" fill="{colour}">{title}</rect>')
        y += 40 + 22 * len(streams)
    x = 10
    for name, _, colour in _KINDS:
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 16}" y="{y}">{name}</text>')
        x += 180
    parts.append(f'<text x="{x}" y="{y}">whole width: {longest:.0f} us</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH + 20}" height="{y + 20}" font-family="sans-serif" '
        'font-size="12">' + "\n".join(parts) + "</svg>\n"
    )
