"""An `InspectReport` as aligned tables."""

from __future__ import annotations

from collections.abc import Sequence

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.inspect_report import DeviceMemory, InspectReport
from minimax_jax.tensor_table import active_parameters

_SHOWN = 20  # lines of one kind of problem; the JSON has them all


def render_text(report: InspectReport) -> str:
    """The report as text: a verdict, tables, and each kind of problem under its own heading."""
    parts = [f"{report.name}: {_verdict(report)}"]
    if report.config is not None:
        parts.append(_section("Configuration", _pairs(_settings(report.config))))
        parts.append(_section("Parameters", _parameters(report, report.config)))
        parts.append(_section("Memory per device (text model, weights split over TP devices)", _memory(report)))
    parts.append(_section(_stored_title(report), _stored(report)))
    parts += [
        _section(f"{kind.capitalize()} ({len(lines)})", _listed(lines)) for kind, lines in report.problems.items()
    ]
    return "\n\n".join(parts)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with aligned columns: the first one to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{row[0]:<{widths[0]}}"]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def format_bytes(count: int) -> str:
    """Decimal units: "854.08 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _verdict(report: InspectReport) -> str:
    if report.check is None:
        return "built-in configuration"
    if not report.ok:
        count = sum(map(len, report.problems.values()))
        return f"{count} problem{'' if count == 1 else 's'}, listed below"
    if report.check.values_read:
        return "no problems, all values finite"
    return "no problems (values not read; --check reads them)"


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _pairs(pairs: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(label) for label, _ in pairs)
    return [f"{label:<{width}}  {value}" for label, value in pairs]


def _settings(c: MiniMaxM3Config) -> list[tuple[str, str]]:
    layers = range(c.num_hidden_layers)
    sparse, moe = sum(map(c.is_sparse, layers)), sum(map(c.is_moe, layers))
    forced = f"{c.index_init_blocks} first and {c.index_local_blocks} local always"
    ends = ", ".join(map(str, c.eos_token_ids)) or "none"
    start = "none" if c.bos_token_id is None else str(c.bos_token_id)
    vision = "none"
    if c.vision is not None:
        vision = f"{c.vision.num_hidden_layers} layers of width {c.vision.hidden_size} (counted, not loaded)"
    return [
        ("layers", f"{len(layers)} of width {c.hidden_size}"),
        ("attention", f"{len(layers) - sparse} dense, {sparse} block-sparse layers"),
        ("heads", f"{c.num_attention_heads} query, {c.num_key_value_heads} key/value, of {c.head_dim}"),
        ("position", f"RoPE over {c.rotary_dim} channels, theta {c.rope_theta:g}"),
        ("index", f"{c.index_n_heads} heads of {c.index_head_dim}"),
        ("blocks", f"of {c.index_block_size} tokens, top {c.index_topk_blocks} ({forced})"),
        ("MLPs", f"{len(layers) - moe} dense of {c.dense_intermediate_size}, {moe} mixtures of experts"),
        ("experts", f"{c.num_local_experts} of {c.intermediate_size}, {c.num_experts_per_tok} a token"),
        ("shared expert", f"{c.n_shared_experts} of {c.shared_intermediate_size}"),
        ("vocabulary", f"{c.vocab_size:,}, {'tied' if c.tie_word_embeddings else 'separate'} output head"),
        ("context", f"{c.max_position_embeddings:,} tokens"),
        ("special tokens", f"start {start}, end {ends}"),
        ("quantisation", "MXFP8" if c.is_mxfp8 else "none"),
        ("vision", vision),
    ]


def _parameters(report: InspectReport, config: MiniMaxM3Config) -> list[str]:
    rows = [("component", "parameters", "active per token")]
    rows += [(row.name, f"{row.parameters:,}", f"{row.active:,}") for row in report.components]
    return table([*rows, ("total", f"{config.num_parameters():,}", f"{sum(active_parameters(config).values()):,}")])


def _memory(report: InspectReport) -> list[str]:
    assert report.config is not None
    context = report.config.max_position_embeddings
    mxfp8 = report.config.is_mxfp8
    header = ["TP", "weights, bfloat16", *(["weights, MXFP8"] if mxfp8 else []), "cache a token"]
    rows = [[*header, f"cache of {context:,} tokens"]]
    rows += [_memory_row(row, context, mxfp8) for row in report.memory if not row.cannot_split]
    refused = [f"TP {row.tensor_ranks} cannot be: {row.cannot_split}" for row in report.memory if row.cannot_split]
    return [*table(rows), *refused]


def _memory_row(row: DeviceMemory, context: int, mxfp8: bool) -> list[str]:
    cache = row.cache_bytes_per_token
    quantised = [format_bytes(row.mxfp8_bytes or 0)] if mxfp8 else []
    weights = [format_bytes(row.bfloat16_bytes), *quantised]
    return [str(row.tensor_ranks), *weights, f"{cache:,} B", format_bytes(cache * context)]


def _stored_title(report: InspectReport) -> str:
    check = report.check
    if check is None:
        return "Stored, as released"
    names = f", {check.style} names" if check.style else ""
    outside = f", {check.ignored:,} of them outside the text model" if check.ignored else ""
    return f"Stored in {check.directory}: {check.tensors:,} readable tensors{outside}{names}"


def _stored(report: InspectReport) -> list[str]:
    sizes = report.stored_bytes
    if not sizes:
        return ["nothing that can be read"]
    rows = [("dtype", "bytes", ""), *((dtype, f"{size:,}", format_bytes(size)) for dtype, size in sizes.items())]
    total = sum(sizes.values())
    return table([*rows, ("total", f"{total:,}", format_bytes(total))])


def _listed(lines: Sequence[str]) -> list[str]:
    shown = ["\n    ".join(part.strip() for part in line.splitlines()) for line in lines[:_SHOWN]]
    rest = len(lines) - _SHOWN
    return [*shown, f"... and {rest:,} more (--json lists all)"] if rest > 0 else shown
