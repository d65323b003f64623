"""The benchmark of products with weights, on a CPU at small sizes."""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks.floors import Ceilings
from benchmarks.products import checks, run
from benchmarks.products.case_run import CaseRun
from benchmarks.products.cases import LOCAL, Case, all_cases, candidates
from benchmarks.products.errors import ROUNDING, measure_errors
from benchmarks.products.run import run_cases, table_launch
from minimax_kernels.matmul_launches import matmul_launch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_products.py"


def test_work_counts_what_is_read_once_and_experts_with_rows_only():
    case = Case("matmul", "o", 64)
    weight = 1024 * 6144 * (1 + 1 / 32)
    assert case.work().bytes == weight + 2 * 64 * (1024 + 6144) and case.work().flops == 2 * 64 * 1024 * 6144
    expert = Case("joined", "gate_up", 64)
    sizes = [3] + [0] * (LOCAL - 2) + [1]
    assert expert.work(sizes).bytes == 2 * 6144 * 6144 * (1 + 1 / 32) + 2 * 4 * (6144 + 3072)


def test_candidates_fit_their_weights():
    for case in all_cases():
        found = candidates(case)
        assert found[0] == case.launch and 3 <= len(found) == len(set(found)) <= 5
        for launch in found:
            assert case.inputs % launch.block_k == 0 and launch.splits <= case.inputs // launch.block_k
            assert all(width % launch.block_n == 0 for width in case.widths)


def test_a_case_is_checked_and_timed_and_its_table_is_read_back(tmp_path, monkeypatch):
    case = Case("matmul", "shared_down", 1, shrink=4)
    lines: list[str] = []
    saved: list = []
    best, rows = run_cases(
        [case], Ceilings(1e9, 1e9), time.monotonic() + 60, lines.append, interpret=True, quick=True,
        save=lambda best, rows: saved.append((dict(best), list(rows))),
    )  # fmt: skip
    (row,) = rows
    assert saved == [(best, rows)]
    assert row.us > 0 and not row.refused and math.isfinite(row.gb_per_s)
    assert 0 < row.errors.rms < 1.1 * row.reference_errors.rms and row.errors.largest < 0.01
    assert best == {("matmul", "mxfp8", 1, 96, 1536, 1): row.launch}
    spec = importlib.util.spec_from_file_location("bench_products", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    chosen = (16, 16, 32, 2, 8, 5)
    namespace: dict = {}
    exec(script.table_text({**best, case.key: chosen}), namespace)
    monkeypatch.setattr("minimax_kernels.matmul_launches.PRODUCTS", namespace["PRODUCTS"])
    launch = matmul_launch(1, 96, 512, 1536)
    assert table_launch(launch) == chosen
    assert matmul_launch(1, 96, 8, 1536).block_n == 8  # widths that the measured tile does not divide


def test_a_result_that_is_wrong_is_noticed(monkeypatch):
    case = Case("matmul", "shared_down", 1, shrink=4)
    own = CaseRun.function

    def spoiled(*args):
        return lambda *x: tuple(y.at[..., -1].add(10 * jnp.std(y)) for y in own(*args)(*x))

    monkeypatch.setattr(CaseRun, "function", spoiled)
    best, (row,) = run_cases([case], Ceilings(1e9, 1e9), time.monotonic() + 60, [].append, interpret=True, quick=True)
    assert row.refused.startswith("wrong") and not best


def test_checks_of_a_layers_other_kernels_notice_what_is_wrong(monkeypatch):
    monkeypatch.setattr(checks, "TOKENS", (7,))
    assert checks._bytes("reference", 64) == checks._choose("reference", 1) == checks._add_norm("reference", 16) == []
    assert checks._route("reference", 16) == checks._route("pallas_triton_interpret", 16) == []
    run = checks._run

    def spoiled(op, impl, **options):
        plain = run(op, impl, **options)
        if impl == "reference":
            return plain
        return lambda *args: jax.tree.map(lambda x: x.at[-1, -1].set(2 * x[-1, -1] + 1), plain(*args))

    monkeypatch.setattr(checks, "_run", spoiled)
    assert checks._bytes("pallas_triton_interpret", 64) and checks._choose("pallas_triton_interpret", 1)
    assert checks._add_norm("pallas_triton_interpret", 16) and checks._route("pallas_triton_interpret", 16)


def test_bytes_are_judged_by_the_exact_answer():
    """On an H100 82 bytes differed under a measure that took XLA's reference for the truth: it had not rounded."""
    data = np.array([b for b in range(256) if b & 0x7F != 0x7F], np.uint8)
    data, scales = np.tile(data, 255), np.repeat(np.arange(255, dtype=np.uint8), data.size)
    exact = checks.exact_bytes(data, scales)
    product = np.ldexp(data.view(ml_dtypes.float8_e4m3fn).astype(np.float64), scales.astype(int) - 127)
    unrounded = np.where(np.isinf(exact), exact, product).astype(np.float32)
    subnormal = np.abs(unrounded) < np.finfo(np.float32).tiny
    assert ((unrounded != exact) & (~subnormal | (exact != 0))).sum() == 82
    assert not checks.wrong_bytes(exact, data, scales, flushes=False).any()
    assert checks.wrong_bytes(unrounded, data, scales, flushes=False).sum() == 96
    flushed = np.where(np.abs(exact) < np.finfo(np.float32).tiny, 0, exact)
    assert checks.wrong_bytes(flushed, data, scales, flushes=False).any()
    assert not checks.wrong_bytes(flushed, data, scales, flushes=True).any()
    assert checks.wrong_bytes(np.nextafter(exact, 1), data, scales, flushes=True).any()


def test_errors_pass_as_many_roundings_and_notice_more():
    truth = jax.random.normal(jax.random.key(0), (32, 256))
    rounded = truth.astype(jnp.bfloat16)
    reference = measure_errors(rounded, truth)
    assert reference.rms == pytest.approx(reference.rounding) and 0 < reference.largest <= ROUNDING
    twice = ((1.3 * truth).astype(jnp.bfloat16).astype(jnp.float32) / 1.3).astype(jnp.bfloat16)
    assert not measure_errors(twice, truth).excess(reference)
    coarse = jax.lax.reduce_precision(truth, 8, 6)  # one bit less
    assert "rms" in measure_errors(coarse, truth).excess(reference)
    for wrong in (rounded.at[3, 5].add(0.05), rounded.at[3, 5].set(jnp.nan)):
        found = measure_errors(wrong, truth)
        assert found.largest > 2 * reference.largest + ROUNDING and found.excess(reference)
        assert measure_errors(wrong, truth, live=3).excess(reference) == ""


def test_no_case_begins_after_the_deadline():
    lines: list[str] = []
    best, rows = run_cases([Case("matmul", "o", 1, shrink=4)], Ceilings(1, 1), 0.0, lines.append, interpret=True)
    assert not best and not rows and "left out for lack of time: o 1 tokens" in lines[0]


def test_what_is_not_compiled_in_time_is_left_out_and_nothing_compiles_while_it_is_timed(monkeypatch):
    cases = [Case("matmul", "o", count, shrink=4) for count in (1, 8, 32)]
    running, seen = [], []

    def compile_slowly(self, launch):
        running.append(launch)
        time.sleep(0.2)
        running.remove(launch)
        return "refused"

    monkeypatch.setattr(CaseRun, "compile", compile_slowly)
    monkeypatch.setattr(CaseRun, "compile_rest", lambda self: None)
    monkeypatch.setattr(run.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(run, "COMPILING", 0.05)
    _, rows = run_cases(
        cases, Ceilings(1, 1), time.monotonic() + 10, [].append, interpret=True,
        save=lambda best, rows: seen.append(list(running)),
    )  # fmt: skip
    refused = [row.refused for row in rows]
    assert seen == [[], [], []] and "refused" in refused and refused[-1] == run.NOT_COMPILED
