"""The benchmark harness: floors by counting, inputs that are what they say, means and verdicts."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import case_data, floors, measure, summary, timing
from benchmarks.cases import (
    BLOCK,
    DECODE_OPS,
    HEADS,
    PREFILL_OPS,
    TOPK,
    Baselines,
    Case,
    baseline_file,
    decode_cases,
    prefill_cases,
)
from minimax_jax.rank_slice.ceilings import Ceilings

CASE = Case("prefill", "x", 3, (130, 1, 70), (5 * BLOCK, 0, 20 * BLOCK - 3))
CEILINGS = Ceilings(3.0e12, 790e12)


def test_floors_count_blocks_and_keys():
    positions = [p + i for n, p in zip(CASE.query_lens, CASE.prefix_lens, strict=True) for i in range(n)]
    blocks = sum(p // BLOCK + 1 for p in positions)
    keys = sum(min(p + 1, (TOPK - 1) * BLOCK + p % BLOCK + 1) for p in positions)
    heads = HEADS[1]
    assert floors.score_work(CASE, heads).flops == 2 * 4 * 128 * BLOCK * blocks
    assert floors.attention_work(CASE, heads).flops == 4 * 64 * 128 * keys
    assert floors.select_work(CASE, heads).bytes == 4 * 4 * (blocks + len(positions) * TOPK)


def test_floors_of_decode_are_bytes_over_bandwidth():
    """64 requests of 32K tokens: 179 us of index keys; 90 us (64/4 heads) or 22 us (8/1) of keys and values."""
    case = Case("decode", "x", 1, (1,) * 64, (32767,) * 64)
    found = [1e6 * floors.floor_seconds("attention", case, HEADS[tp], CEILINGS) for tp in HEADS]
    assert found == pytest.approx([90.2, 22.5], abs=0.1)
    assert 1e6 * floors.floor_seconds("score", case, HEADS[1], CEILINGS) == pytest.approx(179, abs=0.5)
    assert 1e6 * floors.floor_seconds("score", case, HEADS[1], CEILINGS, cached=1) == pytest.approx(179 / 2, abs=0.3)
    # queries and results stay as they are
    assert 1e6 * floors.floor_seconds("attention", case, HEADS[1], CEILINGS, cached=1) == pytest.approx(45.4, abs=0.2)


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "cpu"])
def test_every_case_has_its_baseline(device):
    baselines = Baselines(baseline_file(device))
    assert baselines.name == f"vllm_0.33_triton_{'h200' if 'H200' in device else 'h100'}.jsonl"
    baseline = baselines.of
    for tp in HEADS:
        for rho in (0.0, 0.99):
            assert all({*PREFILL_OPS, "union8"} == set(baseline(c, HEADS[tp], rho)) for c in prefill_cases())
        assert all(set(DECODE_OPS) == set(baseline(c, HEADS[tp], None)) for c in decode_cases())
    assert baseline(decode_cases(8)[0], HEADS[1], None) == {}  # measured with one query a request
    assert baseline(prefill_cases()[0].shrunk(2), HEADS[1], 0.0) == {}


def test_index_queries_follow_the_recurrence():
    rho = 0.9
    noise = np.asarray(jax.random.normal(jax.random.key(0), (50, 2, 3)), np.float64)
    expected, y = [], np.zeros((2, 3))
    for x in noise:
        y = rho * y + np.sqrt(1 - rho**2) * x
        expected.append(y)
    np.testing.assert_allclose(case_data.ar1(jax.random.key(0), (50, 2, 3), rho), expected, atol=1e-5)


def test_sets_of_inputs_share_no_page():
    heads = HEADS[8]
    pool = case_data.make_pool(case_data.pool_pages(CASE, 3), heads)
    assert all(float(np.abs(np.asarray(x[-1], np.float32)).mean()) > 0.5 for x in (pool.k_cache, pool.index_cache))
    sets = case_data.make_inputs(CASE, pool, case_data.Queries(heads, 300), 0.99, 3)
    pages = [
        np.asarray(own.batch.block_tables)[request, :count] for own in sets for request, count in enumerate(CASE.blocks)
    ]
    together = np.concatenate(pages)
    assert len(set(together.tolist())) == len(together) == 3 * sum(CASE.blocks)
    assert (np.diff(pages[0]) != 1).any(), "pages are permuted"


def test_pools_hold_their_sets_and_stay_small():
    for case in (*prefill_cases(), *decode_cases()):
        for heads in HEADS.values():
            sets = case_data.sets_for(case, heads)
            pages = case_data.pool_pages(case, sets)
            assert sum(case.blocks) * sets <= pages and pages % case_data.CHUNK_PAGES == 0
            assert case_data.pool_bytes(pages, heads) < 40e9


def test_neighbours_union():
    selected = np.array([[[0, 1], [1, 2], [3, -1], [3, 4], [9, 9], [7, 7]]])
    assert case_data.union_of_neighbours(selected, (4, 2), tile=2) == pytest.approx((3 + 2 + 2) / 3)


def test_calls_are_all_made():
    """Each set of arguments goes through, chained through `out` or as results of their own."""

    traced = []

    def add(x, out):
        traced.append(x)
        return out + x

    sets = [(jax.numpy.full(3, float(i)),) for i in (1, 2, 4)]
    compiled = timing.compile_calls(add, sets[0], 3, sets[0][0])
    np.testing.assert_array_equal(compiled(tuple(sets), jax.numpy.zeros(3)), np.full(3, 7.0))
    assert len(traced) == 1 and compiled.as_text().count(" add(") == 3  # lowered once, three calls all the same
    alone = timing.compile_calls(lambda x: x * 2, sets[0], 2)
    assert [float(x[0]) for x in measure._outputs(alone, sets, 2)] == [2, 4, 8]
    timed = timing.time_compiled(compiled, sets, 3, jax.numpy.zeros(3), repeats=2)
    assert timed.us > 0 and timed.calls == 3


def test_calls_are_traced_once_and_stay_apart():
    traced = []

    def factor(x):
        traced.append(x)
        return jax.numpy.linalg.cholesky(x)  # a custom call

    compiled = timing.compile_calls(factor, (jax.numpy.eye(2),), 7)
    assert len(traced) == 1 and compiled.as_text().count("custom_call_target=") == 7


def test_rounds_repeat_all_calls():
    """In a loop inside the executable, which XLA must not shorten to one round."""
    sets = ((jax.numpy.full(3, 1.0),), (jax.numpy.full(3, 2.0),))
    compiled = timing.compile_calls(lambda x, out: out + x, sets[0], 2, sets[0][0], rounds=5)
    np.testing.assert_array_equal(compiled(sets, jax.numpy.zeros(3)), np.full(3, 15.0))
    alone = timing.compile_calls(lambda x: jax.numpy.sin(x * 2), sets[0], 2, rounds=5)
    assert [float(x[0]) for x in alone(sets)] == pytest.approx([np.sin(2.0), np.sin(4.0)])
    assert timing.calls_and_rounds(500e-6, 40) == (2, 1)
    assert timing.calls_and_rounds(10e-6, 20) == (20, 20)


def test_caches_of_8_bits_are_compared_case_by_case():
    """Every case twice in a row, selection once; only cases with both times count."""
    types = ("bfloat16", "float8_e4m3fn")
    jobs = measure.select_jobs(["prefill"], [1], [0.0], max_cases=2, cache_dtypes=types)
    assert [job.cache_dtype for job in jobs] == [*types, *types] and jobs[0].case == jobs[1].case
    assert ["select" in job.ops for job in jobs] == [True, False, True, False]
    row = measure.Row(
        "decode", "chain", "a", "a", weight=1, batch=64, tokens=64, longest=900, tp=8, rho=None, us=10.0, floor_us=9.0
    )  # fmt: skip
    narrow = dataclasses.replace(row, us=4.0, floor_us=3.0, cache_dtype="float8_e4m3fn")
    alone = dataclasses.replace(row, case="b", us=100.0)
    assert {mean.group for mean in summary.means([narrow])} == {
        f"decode tp8{kind}, fp8" for kind in ("", " batch>=32", " batch 64")
    }
    faster = summary.speedups([row, narrow, alone])
    assert [(f["cases"], f["speedup"], f["fp8_floor_share"]) for f in faster] == [(1, 2.5, 0.75)] * 3
    assert "2.50" in summary.speedup_table(faster)


def test_means_and_verdicts():
    row = measure.Row(
        "decode", "chain", "a", "a", weight=3, batch=64, tokens=64, longest=9000, tp=8, rho=None,
        us=10.0, vllm_us=12.0, ratio=1.2, floor_us=9.5, floor_share=0.95,
    )  # fmt: skip
    other = dataclasses.replace(row, weight=1, us=30.0, vllm_us=30.0, ratio=1.0, floor_us=28.5)
    refused = dataclasses.replace(row, us=None, refused="refused: no")
    found = {mean.group: mean for mean in summary.means([row, other, refused])}
    mean = found["decode tp8 batch>=32"]
    assert (mean.us, mean.vllm_us, mean.cases) == (15.0, 16.5, 2)
    assert mean.ratio == pytest.approx(1.1) and mean.floor_share == pytest.approx(0.95)
    verdicts = {target.text: verdict for target, _, verdict in summary.check_targets(list(found.values()))}
    assert verdicts["decode chain TP8, batch >= 32"] == "aim"
    assert verdicts["decode chain TP8, batch >= 32, of copy bandwidth"] == "met"
    assert "decode chain TP8, batch 1-8" not in verdicts
