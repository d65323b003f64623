"""What is checked of each operation on one sample."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import minimax_kernels as mk
from benchmarks.parity import compare
from benchmarks.parity.compare import Mismatch, Result, require
from benchmarks.parity.samples import ParityCase, Sample, make_sample, random_selection

TIE_FLOOR, TIE_MOST = 1e-4, 2e-2  # near-ties are told by four times the measured score error, within these

Check = Callable[[Sample, str], Iterator[tuple[str, Callable[[], dict[str, float]]]]]


@functools.cache
def jitted(op: str, impl: str, **options: Any) -> Callable[..., Any]:
    """One jit for all cases of an operation."""
    return jax.jit(functools.partial(getattr(mk, op), impl=impl, **options))


def check_op(op: str, case: ParityCase, impl: str, seed: int = 0) -> list[Result]:
    """All checks of one operation on one case; a refusal and an error become results too."""
    sample = make_sample(case, seed)
    results = []
    for name, check in CHECKS[op](sample, impl):
        try:
            results.append(Result(op, str(case), name, "ok", errors=check()))
        except Mismatch as mismatch:
            results.append(Result(op, str(case), name, "FAILED", str(mismatch)))
        except NotImplementedError as refusal:
            results.append(Result(op, str(case), name, "refused", str(refusal)))
        except Exception as error:  # noqa: BLE001 a compiler's error must not hide the other cases
            results.append(Result(op, str(case), name, "FAILED", f"{type(error).__name__}: {str(error)[:600]}"))
    return results


def _score(sample: Sample, impl: str) -> np.ndarray:
    return np.asarray(jitted("index_score", impl)(sample.idx_q, sample.index_cache, sample.batch))


def _select(sample: Sample, scores: Any, impl: str) -> np.ndarray:
    options = sample.case.shape.options
    return np.asarray(jitted("select_blocks", impl, **options)(jnp.asarray(scores), sample.batch))


def _repeat(sample: Sample, selected: np.ndarray) -> np.ndarray:
    """One selection a KV head where index heads are fewer."""
    return np.repeat(selected, sample.case.shape.selection_heads // selected.shape[0], axis=0)


def _index_score(sample: Sample, impl: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    def parity() -> dict[str, float]:
        scores = _score(sample, impl)
        errors = compare.score_errors(scores, _score(sample.upcast(), "reference"))
        require(compare.bit_equal(scores, _score(sample, impl)), "a repeat differs")
        return errors

    yield "float32 parity, repeat", parity


def _select_blocks(sample: Sample, impl: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    shape, random = sample.case.shape, np.random.default_rng(1)
    reference = _score(sample.upcast(), "reference")
    padding = random.choice(np.float32([np.nan, 5, -np.inf, np.inf]), reference[:, ~sample.live].shape)

    def exact(scores: np.ndarray) -> dict[str, float]:
        scores = scores.copy()
        scores[:, ~sample.live] = padding
        selected, expected = (_select(sample, scores, name) for name in (impl, "reference"))
        compare.well_formed(selected, expected)
        wrong = compare.different_rows(selected, expected)
        require(not wrong.any(), f"{int(wrong.sum())} rows select other blocks, first [head, row] {_first(wrong)}")
        require(compare.bit_equal(selected, _select(sample, scores, impl)), "a repeat differs")
        return {}

    ties = np.where(np.isneginf(reference), reference, random.integers(-2, 2, reference.shape)).astype(np.float32)

    def chain() -> dict[str, float]:
        scores = _score(sample, impl)
        selected, expected = _select(sample, scores, impl), _select(sample, reference, "reference")
        compare.well_formed(selected, expected)
        tolerance = _tie_tolerance(compare.score_errors(scores, reference))
        gap = compare.score_gap(selected, expected, np.where(np.isneginf(reference), 0, reference))
        wrong = compare.different_rows(selected, expected) & (gap > tolerance)
        require(not wrong.any(), f"{int(wrong.sum())} rows select worse blocks, first [head, row] {_first(wrong)}")
        share = float(compare.different_rows(selected, expected)[:, sample.live].mean()) if sample.live.any() else 0.0
        return {"near_tie_rows": share, "gap": float(gap.max())}

    yield "exact on random scores", lambda: exact(reference)
    yield "exact on tied scores", lambda: exact(ties)
    yield f"from own scores, as the reference (init {shape.init}, local {shape.local})", chain


def _sparse_attention(sample: Sample, impl: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    def parity(selected: Any) -> dict[str, float]:
        def run(own: Sample, name: str, out: Any = None) -> np.ndarray:
            call = jitted("sparse_attention", name, scale=own.scale)
            return np.asarray(call(own.q, own.k_cache, own.v_cache, jnp.asarray(selected), own.batch, out=out))

        return _attention_parity(sample, impl, run)

    def reference_selection() -> dict[str, float]:
        selected = _repeat(sample, _select(sample, _score(sample.upcast(), "reference"), "reference"))
        return parity(selected)

    yield "reference's selection, poisoned out, repeat", reference_selection
    yield "any selection, poisoned out, repeat", lambda: parity(random_selection(sample, 2))


def _dense_attention(sample: Sample, impl: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    def run(own: Sample, name: str, out: Any = None) -> np.ndarray:
        call = jitted("dense_attention", name, scale=own.scale)
        return np.asarray(call(own.q, own.k_cache, own.v_cache, own.batch, out=out))

    yield "float32 parity, poisoned out, repeat", lambda: _attention_parity(sample, impl, run)


def _attention_parity(sample: Sample, impl: str, run: Callable[..., np.ndarray]) -> dict[str, float]:
    result = run(sample, impl)
    require(str(result.dtype) == sample.case.shape.dtype, f"the result is {result.dtype}: must be q's type")
    errors = compare.attention_errors(
        compare.as_float(result), compare.as_float(run(sample.upcast(), "reference")), sample.live
    )
    require(compare.bit_equal(result, run(sample, impl)), "a repeat differs")
    kept = run(sample, impl, jnp.full(sample.q.shape, jnp.nan, sample.q.dtype))
    compare.padding_kept(result, kept, sample.live)
    return errors


def _msa(sample: Sample, impl: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    def run(own: Sample, out: Any = None) -> np.ndarray:
        call = jitted("msa", impl, scale=own.scale, **own.case.shape.options)
        return np.asarray(call(own.q, own.k_cache, own.v_cache, own.idx_q, own.index_cache, own.batch, out=out))

    def attend(own: Sample, selected: np.ndarray) -> np.ndarray:
        call = jitted("sparse_attention", "reference", scale=own.scale)
        wide = own.upcast()
        return np.asarray(call(wide.q, wide.k_cache, wide.v_cache, jnp.asarray(_repeat(own, selected)), wide.batch))

    def parity(own: Sample, exact: bool) -> dict[str, float]:
        shape = own.case.shape
        result = run(own)
        scores, wide = _score_or_reference(own, impl), _score(own.upcast(), "reference")
        expected = attend(own, _select(own, wide, "reference"))
        alike = compare.row_errors(compare.as_float(result), expected, shape.selection_heads) <= compare.SAME_ROW
        other = ~alike[:, own.live].all(axis=0)  # rows of another selection
        ambiguous = 0
        if other.any():
            gap = compare.margin(wide, own.positions, shape.block, shape.topk, shape.init, shape.local)
            tolerance = _tie_tolerance(compare.score_errors(scores, wide))
            gap = _repeat(own, gap)[:, own.live]
            clear = ~alike[:, own.live] & ((gap > tolerance) | exact)
            require(
                not clear.any(),
                f"{int(clear.any(axis=0).sum())} of {own.live.sum()} rows do not attend to the reference's blocks, "
                f"first [head, row] {_first(clear)}",
            )
            second = attend(own, _select(own, scores, "reference"))  # what their own scores select
            expected[np.flatnonzero(own.live)[other]] = second[np.flatnonzero(own.live)[other]]
            again = compare.row_errors(compare.as_float(result), expected, shape.selection_heads) <= compare.SAME_ROW
            unknown = ~again.all(axis=0) & own.live
            ambiguous = int(unknown.sum())
            require(ambiguous <= 1 + 0.01 * own.live.sum(), f"{ambiguous} near-tied rows fit neither selection")
            expected[unknown] = compare.as_float(result)[unknown]
        errors = compare.attention_errors(compare.as_float(result), expected, own.live)
        require(compare.bit_equal(result, run(own)), "a repeat differs")
        kept = run(own, jnp.full(own.q.shape, jnp.nan, own.q.dtype))
        compare.padding_kept(result, kept, own.live)
        return {**errors, "near_tie_rows": float(other.mean()) if other.size else 0.0, "ambiguous": float(ambiguous)}

    yield "float32 parity, poisoned out, repeat", lambda: parity(sample, exact=False)
    yield "exact ties, lower block wins", lambda: parity(make_sample(sample.case, 3, ties=True), exact=True)


def _score_or_reference(sample: Sample, impl: str) -> np.ndarray:
    """The implementation's scores where it serves the operation on its own."""
    try:
        return _score(sample, impl)
    except NotImplementedError:
        return _score(sample.upcast(), "reference")


def _tie_tolerance(score_errors: dict[str, float]) -> float:
    return min(max(4 * score_errors["max"], TIE_FLOOR), TIE_MOST)


def _write_kv(sample: Sample, impl: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    random = np.random.default_rng(4)
    pages, heads, block, dim = sample.k_cache.shape
    rows = len(sample.live)

    def parity(dtype: Any) -> dict[str, float]:
        slots = _slots(random, rows, pages * block)
        k, v = (jnp.asarray(_new_rows(random, rows, heads, dim), dtype) for _ in "kv")
        caches = (sample.k_cache, sample.v_cache)
        wanted = jitted("write_kv", "reference")(*caches, k, v, slots)
        _written_in_place("write_kv", impl, caches, (k, v, slots), wanted)
        return {}

    yield "bits, skipped slots, in place", lambda: parity(sample.q.dtype)
    yield "float32 into the caches' type", lambda: parity(jnp.float32)


def _write_index(sample: Sample, impl: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    random = np.random.default_rng(5)
    pages, block, dim = sample.index_cache.shape
    rows = len(sample.live)

    def parity(dtype: Any) -> dict[str, float]:
        slots = _slots(random, rows, pages * block)
        keys = jnp.asarray(_new_rows(random, rows, 1, dim), dtype)
        wanted = (jitted("write_index", "reference")(sample.index_cache, keys, slots),)
        _written_in_place("write_index", impl, (sample.index_cache,), (keys, slots), wanted)
        return {}

    yield "bits, skipped slots, in place", lambda: parity(sample.q.dtype)
    yield "float32 into the cache's type", lambda: parity(jnp.float32)


def _write_kv_index(sample: Sample, impl: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    random = np.random.default_rng(6)
    pages, heads, block, dim = sample.k_cache.shape
    rows = len(sample.live)

    def parity() -> dict[str, float]:
        slots = _slots(random, rows, pages * block)
        new = tuple(jnp.asarray(_new_rows(random, rows, count, dim), sample.q.dtype) for count in (heads, heads, 1))
        caches = (sample.k_cache, sample.v_cache, sample.index_cache)
        wanted = jitted("write_kv_index", "reference")(*caches, *new, slots)
        _written_in_place("write_kv_index", impl, caches, (*new, slots), wanted)
        return {}

    yield "bits, skipped slots, in place", parity


def _norm_rope(sample: Sample, impl: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    random, shape, tokens = np.random.default_rng(7), sample.case.shape, len(sample.live)

    def normal(*size: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(size, np.float32), shape.dtype)

    def parity() -> dict[str, float]:
        heads = (shape.q_heads, shape.kv_heads, shape.index_heads, 1)
        angles = random.uniform(0, 1e5, (tokens, shape.head_dim // 4))
        args = (
            tuple(normal(tokens, count, shape.head_dim) for count in heads),
            tuple(normal(shape.head_dim) for _ in heads),
            jnp.asarray(np.cos(angles), jnp.float32),
            jnp.asarray(np.sin(angles), jnp.float32),
        )
        return _heads_parity("norm_rope", impl, args, most_log2=-7)

    yield "against the reference, repeat", parity


def _heads_parity(op: str, impl: str, args: tuple, most_log2: int) -> dict[str, float]:
    """The largest error may be a few roundings of the largest head."""
    results, again, wanted = (jitted(op, name, eps=1e-6)(*args) for name in (impl, impl, "reference"))
    worst = 0.0
    for result, repeat, expected in zip(results, again, wanted, strict=True):
        require(compare.bit_equal(result, repeat), "a repeat differs")
        error = np.abs(compare.as_float(result) - compare.as_float(expected))
        worst = max(worst, float(error.max(initial=0) / np.abs(compare.as_float(expected)).max(initial=1)))
    require(worst <= 2.0**most_log2, f"max error {worst:.5f} of the largest > 2 ** {most_log2}")
    return {"max_rel": worst}


def _project_norm_rope(sample: Sample, impl: str) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Up to 256 tokens by fewer launches than the operations that it is made of, to the same results."""
    random, shape, tokens = np.random.default_rng(8), sample.case.shape, len(sample.live)
    heads, features = (shape.q_heads, shape.kv_heads, shape.kv_heads, shape.index_heads, 1), 2048

    def weight(columns: int, quantised: bool) -> Any:
        values = jnp.asarray(random.standard_normal((features, columns), np.float32))
        if not quantised:
            return values.astype(jnp.bfloat16)
        scales = jnp.asarray(random.integers(120, 124, (columns, features // 32)), jnp.uint8)
        return mk.Mxfp8(values.T.astype(jnp.float8_e4m3fn), scales)

    def parity(quantised: bool) -> dict[str, float]:
        angles = random.uniform(0, 1e5, (tokens, shape.head_dim // 4))
        norm = jnp.asarray(random.standard_normal(shape.head_dim), jnp.bfloat16)
        args = (
            jnp.asarray(random.standard_normal((tokens, features), np.float32), jnp.bfloat16),
            tuple(weight(count * shape.head_dim, quantised) for count in heads),
            (norm, norm, None, norm, norm),
            jnp.asarray(np.cos(angles), jnp.float32),
            jnp.asarray(np.sin(angles), jnp.float32),
        )
        return _heads_parity("project_norm_rope", impl, args, most_log2=-6)

    yield "MXFP8 weights against the reference, repeat", lambda: parity(True)
    if tokens <= 64:  # more rows of arrays are XLA's to multiply
        yield "bf16 weights against the reference, repeat", lambda: parity(False)


def _new_rows(random: np.random.Generator, *shape: int) -> np.ndarray:
    """N(0, 1), and some rows beyond what e4m3 has numbers for."""
    rows = random.standard_normal(shape, np.float32)
    rows[::3] *= 300
    rows[:1, :, :2] = np.inf, -np.inf
    return rows


def _slots(random: np.random.Generator, rows: int, slots: int) -> jax.Array:
    """Unique slots, both ends of the cache among them, a fifth of them -1."""
    middle = random.permutation(slots - 2)[: max(rows - 2, 0)] + 1
    chosen = random.permutation(np.concatenate([[0, slots - 1], middle])[:rows])
    return jnp.asarray(np.where(random.random(rows) < 0.2, -1, chosen), jnp.int32)


def _written_in_place(op: str, impl: str, caches: tuple, args: tuple, wanted: tuple) -> None:
    donating = jax.jit(functools.partial(getattr(mk, op), impl=impl), donate_argnums=tuple(range(len(caches))))
    own = tuple(jnp.array(cache, copy=True) for cache in caches)
    pointers = [cache.unsafe_buffer_pointer() for cache in own]
    results = donating(*own, *args)
    results = results if isinstance(results, tuple) else (results,)
    for name, result, expected, pointer in zip(("first", "second"), results, wanted, pointers, strict=False):
        require(compare.bit_equal(result, expected), f"the {name} cache differs from the reference's")
        require(result.unsafe_buffer_pointer() == pointer, f"the {name} cache moved: not written in place")


_first = compare.first

CHECKS: dict[str, Check] = {
    "write_kv": _write_kv,
    "write_index": _write_index,
    "write_kv_index": _write_kv_index,
    "norm_rope": _norm_rope,
    "project_norm_rope": _project_norm_rope,
    "index_score": _index_score,
    "select_blocks": _select_blocks,
    "sparse_attention": _sparse_attention,
    "dense_attention": _dense_attention,
    "msa": _msa,
}
