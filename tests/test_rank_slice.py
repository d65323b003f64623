"""`minimax-jax bench rank-slice`: what it counts, what it builds, and a run at small sizes through the command line."""

import itertools
import json
import os
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimax_jax.cli import build_parser, main
from minimax_jax.parallel import Layout, ParallelConfig
from minimax_jax.rank_slice import measure
from minimax_jax.rank_slice.attention_work import causal_keys
from minimax_jax.rank_slice.cases import DECODE, PREFILL, TARGETS, Case, select_cases, slice_config, waves
from minimax_jax.rank_slice.ceilings import Ceilings
from minimax_jax.rank_slice.comm import SliceComm
from minimax_jax.rank_slice.compiling import Compiler, side_by_side
from minimax_jax.rank_slice.float_copies import float_copies
from minimax_jax.rank_slice.kernel_classes import class_times, kernel_table
from minimax_jax.rank_slice.report import _kernel_lines, table
from minimax_jax.rank_slice.slice_engine import SliceEngine
from minimax_jax.rank_slice.trace import Launch, typical_lengths
from minimax_jax.rank_slice.weights import draw_weights, routing_load, weight_structs
from minimax_jax.rank_slice.work import step_work, whole
from minimax_kernels import Mxfp8
from minimax_kernels.mxfp8 import dequantize

H100 = Ceilings(3.0e12, 790e12)
M3 = Layout(slice_config(60, tiny=False), ParallelConfig(tensor=8, expert=8))
TINY = Layout(slice_config(1, tiny=True), ParallelConfig(tensor=8, expert=8))


def num_bytes(leaf) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(leaf))


def test_a_ranks_slice_of_m3_fits_one_h100():
    four = Layout(slice_config(4, tiny=False), M3.parallel)
    structs = weight_structs(four, "mxfp8", jnp.bfloat16)
    assert structs["layers.3.mlp.experts.gate_up_proj"].values.shape == (16, 6144, 6144)
    assert structs["layers.3.mlp.experts.gate_up_proj"].scales.shape == (16, 6144, 192)
    assert structs["layers.0.self_attn.o_proj"].scales.shape == (6144, 32)
    assert structs["layers.3.self_attn.k_proj"].shape == (6144, 128)  # of four heads one
    assert structs["layers.3.mlp.gate.weight"].dtype == jnp.float32
    held = num_bytes(structs)
    assert 53e9 < held + 56 * num_bytes([x for name, x in structs.items() if "layers.3." in name]) < 56e9
    # a batch that meets all experts reads every weight but the embedding
    work = whole(step_work(four, Case(DECODE, 4096, 1, 0), weights="mxfp8"))
    caches = 4096 * 2 * (4 * 2 * 128 * 2 + 128 * 2)  # read and written once
    rest = num_bytes([x for x in structs.values() if len(x.shape) == 1]) + num_bytes(structs["embed_tokens"])
    assert work.bytes == pytest.approx(held - rest + caches, rel=1e-6)


def test_floors_of_the_cases_that_have_targets():
    floors = {case: 1e3 * whole(step_work(M3, case, weights="mxfp8")).seconds(H100) for case in TARGETS}
    # docs/performance.md; where the second and third are more than the target, no kernel can reach it
    assert [round(floor, 1) for floor in floors.values()] == [1.3, 14.0, 28.6, 69.4, 85.9]
    chunk = step_work(M3, Case(PREFILL, 1, 8192, 0), weights="mxfp8")
    rows = 8192 * 4 / 8  # of the choices, those of this rank's experts
    assert chunk["experts"].flops == pytest.approx(57 * 2 * rows * 3 * 6144 * 3072)
    assert chunk["attend"].flops > 3 * 4 * 8 * 128 * causal_keys(8192, 0)
    skewed = step_work(
        M3, Case(PREFILL, 1, 8192, 0), weights="mxfp8", experts_load=dict.fromkeys(range(3, 60), [1 / 64] * 16)
    )
    assert skewed["experts"].flops == pytest.approx(2 * chunk["experts"].flops)
    few = [
        step_work(M3, Case(DECODE, 32, 1, 0), weights="mxfp8", experts_load=dict.fromkeys(range(3, 60), load))
        for load in ([1 / 128] * 16, [0.125])
    ]
    assert few[0]["experts"].bytes == pytest.approx(16 * (1 - (31 / 32) ** 32) * few[1]["experts"].bytes, rel=1e-3)
    assert few[0]["experts"].flops == pytest.approx(few[1]["experts"].flops)  # as many rows, of one hot expert
    loads = {layer: [1 / 32 if layer == 3 else 1 / 128] * 16 for layer in range(3, 60)}  # each layer has its own
    mixed = step_work(M3, Case(DECODE, 32, 1, 0), weights="mxfp8", experts_load=loads)
    assert mixed["experts"].flops == pytest.approx(few[0]["experts"].flops * (56 + 4) / 57)
    assert "select" not in chunk  # scores stay on the chip
    assert causal_keys(3, 2) == 3 + 4 + 5


def test_few_layers_are_those_around_the_first_sparse_one():
    assert [slice_config(n, tiny=True).mlp_layer_types for n in (1, 2)] == [("sparse",), ("dense", "sparse")]
    assert slice_config(5, tiny=False).layer_types == ("full_attention",) * 3 + ("minimax_m3_sparse",) * 2


def test_cases_with_a_target_come_first():
    cases = select_cases((1, 32, 64), (8192, 32768), 8192, (0, 57344))
    assert len(cases) == 8 and set(cases[:5]) == set(TARGETS)
    groups = waves(cases)
    assert [(group[0].kind, len(group)) for group in groups] == [(PREFILL, 2), (DECODE, 3), (DECODE, 3)]
    assert {*groups[0], *groups[1]} == set(TARGETS)
    both = [select_cases((1, 32, 64), (8192, 32768), 8192, (0, 57344), kind) for kind in (PREFILL, DECODE)]
    assert both == [[case for case in cases if case.kind == kind] for kind in (PREFILL, DECODE)]


def test_what_does_not_compile_in_time_is_not_waited_for():
    gate, compiler = threading.Event(), Compiler()
    tasks = {"fast": lambda: 1, "slow": gate.wait}
    assert [(key, done.result()) for key, done in compiler.run(tasks, 0.5)] == [("fast", 1)]
    assert compiler.compiling == 1
    gate.set()
    assert [key for key, _ in compiler.run({"next": int}, 60.0)] == ["next"]


def test_tasks_side_by_side_meet_and_fail_as_they_would_alone():
    both = threading.Barrier(2)
    tasks = {name: lambda: both.wait(60.0) for name in "ab"}
    if (os.cpu_count() or 1) > 1:
        assert sorted(side_by_side(tasks)) == ["a", "b"] and not both.broken
    assert side_by_side({}) == {} and side_by_side({"one": int}) == {"one": 0}
    with pytest.raises(KeyError, match="gone"):
        side_by_side({"one": int, "two": lambda: {}["gone"]})


def test_weights_are_bytes_on_the_device_that_keep_activations_of_their_size():
    structs = weight_structs(TINY, "mxfp8", jnp.float32)
    state = draw_weights(TINY.config, structs, "skewed")
    jax.tree.map(lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)), state, structs)
    for name, leaf in state.items():
        if isinstance(leaf, Mxfp8):
            values, scales = np.asarray(leaf.values).astype(np.float32), np.asarray(leaf.scales).astype(int)
            matrix = values * np.repeat(2.0 ** (scales - 127), 32, axis=-1)
            assert np.isfinite(matrix).all(), name
            inputs = {"o_proj": 512, "down_proj": 64 if ".experts." in name else 256}.get(name.split(".")[-1], 128)
            assert 0.5 < matrix.std() * inputs**0.5 < 2.5, name
    (skewed,) = routing_load(TINY.config, state, range(16)).values()
    assert sum(skewed) == pytest.approx(1) and max(skewed) > 2 / 16 and min(skewed) < 0.5 / 16
    state["layers.0.mlp.gate.e_score_correction_bias"] *= 0
    assert sum(routing_load(TINY.config, state, range(2, 4))[0]) == pytest.approx(1 / 8, rel=0.3)
    two = slice_config(2, tiny=True).replace(mlp_layer_types=("sparse", "sparse"))
    hot = {f"layers.1.mlp.gate.{part}": state[f"layers.0.mlp.gate.{part}"] for part in ("weight",)}
    hot["layers.1.mlp.gate.e_score_correction_bias"] = jnp.zeros(16).at[3].set(2.0)
    loads = routing_load(two, state | hot, range(2, 4))
    assert loads[0] == routing_load(TINY.config, state, range(2, 4))[0] and loads[1][1] == 1 / 4  # always, of four
    plain = weight_structs(TINY, "bf16", jnp.bfloat16)
    assert not any(isinstance(leaf, Mxfp8) for leaf in plain.values())


def test_a_rank_alone_does_what_is_its_own():
    comm = SliceComm(place=1, ranks=8, experts_per_rank=2, expert_place=1)
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.jit(comm.sum_mlp)(x), x)
    np.testing.assert_array_equal(comm.lookup(x, jnp.array([2, 3])), x)  # its ids are 2 and 3
    assert comm.argmax_vocab(x).tolist() == [5, 5] and comm.gather_vocab(x).shape == (2, 24)
    ids = jnp.array([[2, 0], [7, 3]])
    seen = []

    def experts(rows, expert_ids, weights, addend, first_expert):
        seen.append((expert_ids.tolist(), first_expert))
        return rows + addend

    np.testing.assert_array_equal(comm.run_experts(experts, x, ids, ids, lambda rows: rows), 2 * x)
    assert seen == [([[2, 0], [7, 3]], 2)]


def test_kernels_are_told_apart_by_name_and_module():
    names = {
        "mxfp8_matmul": "matmul", "sm90_xmma_gemm_bf16bf16": "matmul", "grouped_matmul_swiglu": "experts",
        "combine_rows": "experts", "index_score_few_rows": "score", "select_blocks": "select", "write_pages": "write",
        "sparse_attention_by_token": "attend", "merge_partials": "attend", "dense_attention": "attend",
        "choose_experts": "experts", "sort_pairs": "experts", "place_pairs": "experts", "add_norm": "elementwise",
        "router_logits": "matmul", "sum_splits_swiglu": "matmul", "gather_rows": "experts", "cut_rows": "experts",
        "several_matmuls": "matmul", "sum_splits": "matmul", "gemm_fusion_dot_12": "matmul", "norm_rope": "elementwise",
        "grouped_matmul": "experts", "index_score_many_rows": "score", "sparse_attention_by_page": "attend",
        "wrapped_add": "elementwise", "sum_norm_rope": "elementwise",
        "loop_add_fusion_3": "elementwise", "MemcpyD2D": "copies",
    }  # fmt: skip
    layers = [Launch(name, "s", 0.0, 2.0, "jit__layers") for name in names]
    picks = [Launch("nvjet_hsh", "s", 0.0, 2.0, "jit__pick"), Launch("sum_splits", "s", 0.0, 1.0, "jit__pick")]
    picks += [Launch("input_reduce_fusion", "s", 0.0, 1.0, "jit__pick")]
    for launch, kind in zip(layers, names.values(), strict=True):
        assert class_times([launch]) == {kind: 2.0}, launch.name
    assert class_times(picks) == {"head": 3.0, "sampling": 1.0}
    sort = "DeviceRadixSortOnesweepKernel"  # of pairs: of tokens and experts, or of queries and pages
    assert class_times([Launch(sort, "s", 0.0, 1.0, "jit_layers_D")]) == {"experts": 1.0}
    assert class_times([Launch(sort, "s", 0.0, 1.0, "jit__sparse_layer")]) == {"attend": 1.0}
    rows = kernel_table([*layers, *layers, *picks, *picks], steps=2)
    assert len(rows) == len(names) + 3
    assert (rows[0]["us"], rows[0]["calls"], rows[0]["mean_us"]) == (2.0, 1, 2.0)
    case = {"kind": DECODE, "gaps_us": 12.0, "launches_a_layer": 20.5, "kernels": rows * 2}
    case |= {"step_ms": 0.1, "profiled_busy_us": 88.0}
    lines = _kernel_lines(case)
    assert "12 us a step without a kernel; 20.5 launches a layer" in lines[0] and len(lines) == 2 + 25
    assert "jit__layers" in lines[2] and not _kernel_lines({"gaps_us": None})
    assert "busy for 188 us, longer than a step's 100 us" in _kernel_lines(case | {"profiled_busy_us": 188.0})[1]


def test_kernels_during_which_another_process_had_the_device_count_as_in_other_steps():
    """Next to three other processes an H100 was said to take 1955 us for a head of 115 us, more than its step took."""
    lengths = [[4.0, 2.0, 115.0], [5.0, 2.0, 7475.0], [4.0, 900.0, 116.0]]
    launches = [
        Launch(name, "s", float(3 * step + place), length, "jit__pick" if place == 2 else "jit__layers")
        for step, own in enumerate(lengths)
        for place, (name, length) in enumerate(zip(("add", "add", "nvjet"), own, strict=True))
    ]
    once = Launch("memcpy", "s", 9.0, 1.0)
    typical = typical_lengths([*launches, once], 3)
    assert [launch.length for launch in typical] == [4.0, 2.0, 116.0] * 3 + [1.0]
    assert class_times(typical) == {"elementwise": 18.0, "head": 348.0, "copies": 1.0}


def test_copies_in_floats_are_found_where_they_are_written():
    w = Mxfp8(jnp.zeros((96, 64), jnp.float8_e4m3fn), jnp.zeros((96, 2), jnp.uint8))
    written = jax.jit(dequantize).lower(w).compile().as_text()
    assert float_copies(written, [(64, 96)]) and not float_copies(written, [(96, 80)])
    assert float_copies(written, [(96, 64)]) and not float_copies(written, [(96, 64)], [(64, 96)])  # floats anyway
    other_forms = """
ENTRY %m (a: f8e4m3fn[64,96]) -> bf16[96,64] {
  %turned = bf16[96,64]{1,0} fusion(%a), kind=kLoop, calls=%x
  %joined = bf16[64,224]{1,0} fusion(%a), kind=kLoop, calls=%y
  %flat = bf16[6144]{0} convert(%a)
  %experts = f32[2,48,64]{2,1,0} convert(%a)
  %hidden = bf16[2,128]{1,0} convert(%a)
}"""
    activations = "ENTRY %m (a: f32[2]) -> f32[2] {\n  %down = bf16[256,6144]{1,0} custom-call(%a)\n}"
    assert float_copies(activations, [(6144, 128)]) == ["down"]  # k_proj and v_proj, or 64 tokens' four experts
    assert not float_copies(activations, [(6144, 128)], [(256, 6144)])
    assert float_copies(other_forms, [(64, 96), (64, 128), (4, 64, 48)]) == ["turned", "joined", "flat", "experts"]
    inside = """
%fused_multiply (p0: f8e4m3fn[64,96]) -> bf16[4,96] {
  %w = bf16[64,96]{1,0} convert(%p0)
  ROOT %d = bf16[4,96]{1,0} dot(%x, %w)
}
ENTRY %main (a: f8e4m3fn[64,96]) -> bf16[4,96] {
  ROOT %f = bf16[4,96]{1,0} fusion(%a), kind=kCustom, calls=%fused_multiply
}"""
    assert not float_copies(inside, [(64, 96)]) and float_copies(inside, [(1, 4, 96)]) == ["f"]
    twice = "ENTRY %m (a: f32[2,3]) -> f32[2,3] {\n  %a = f32[2,3]{1,0} parameter(0)\n"
    twice += (
        "  %two = (f32[2,3]{1,0}, s32[3]) fusion(%a), kind=kLoop, calls=%c\n  %g = f32[2,3] get-tuple-element(%two)\n}"
    )
    assert float_copies(twice, [(2, 3)]) == ["two"]


def test_results_of_experts_are_no_copies_of_weights():
    """On an H100 a step of 64 tokens was said to write five copies: [64 * 4, 6144] is as large as k_proj and v_proj."""
    engine = SimpleNamespace(_layout=M3, _config=M3.config)
    known = SliceEngine._activations(engine, Case(DECODE, 64, 1, 8192))
    assert {(64, 6144), (256, 6144), (256, 3072)} <= known and (6144, 256) not in known


def test_a_run_at_small_sizes(tmp_path, capsys):
    sizes = ["--layers", "1", "--batch", "2", "--context", "40", "--chunk", "32", "--prefix", "32"]
    options = ["--routing", "skewed", "--cache-dtype", "fp8", "--launch-steps", "1,3"]
    assert main(["bench", "rank-slice", "--tiny", *sizes, *options, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    report = json.loads((tmp_path / "rank_slice.json").read_text())
    assert [case["case"] for case in report["cases"]] == ["prefill, 32 tokens after 32", "decode, batch 2, context 40"]
    for case in report["cases"]:
        assert case["step_ms"] > 0 and case["times_floor"] == pytest.approx(case["step_ms"] / case["floor_ms"])
        assert case["finite"] and case["target_ms"] is None and case["distinct_pages"] == 1
        assert case["layer_us"] == pytest.approx(case["step_ms"] * 1000)
        assert "peak_bytes" not in case  # it is the run's, not a case's
        assert {"matmul", "experts", "score", "attend", "write", "head"} <= set(case["classes"])
    assert report["weights"]["bytes"] > 0 and report["ceilings"]["copy_bytes_per_s"] > 0 and not report["left_out"]
    assert report["pool_bytes"] == 20 * 16 * (2 * 32 + 32)  # pages of 16 tokens, a byte a number
    own = ["tp", "ep", "rank", "layers", "batch", "context", "chunk", "prefix", "routing", "weights", "cache_dtype"]
    own += ["only", "limit_s", "seed", "tiny"]
    own += ["launch_steps", "device", "dtype", "collectives", "jax", "python", "date"]
    assert set(report["setting"]) == set(own)  # nothing of `bench`
    assert report["setting"]["routing"] == "skewed" and report["routing"]["share_of_rank"]["0"] > 0
    assert "decode, batch 2, context 40" in table(report) and "rank_slice.json" in printed.out
    assert "compiled decode, batch 2, context 40, 3 a launch" in printed.err and not report["failed"]
    chunk, decode = report["cases"]
    assert [(way["steps"], way["graphs"]) for way in decode["launchings"]] == [(1, False), (3, False)]
    assert decode["step_ms"] == min(way["step_ms"] for way in decode["launchings"]) and not chunk["launchings"]
    assert "(3 a launch, no graphs" in printed.out


def test_what_no_way_of_launching_knows_stays_unknown():
    """Without weights in 8 bits, "no copies of them in floats" would be said of nothing."""
    assert measure.most([None, None]) is None and measure.most([3, None, 5]) == 5 and measure.most([0, None]) == 0


def test_cases_left_out_for_want_of_time_are_a_failure(tmp_path, monkeypatch, capsys):
    ticks = itertools.count()
    monkeypatch.setattr(measure, "time", SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=lambda: 0.0))
    sizes = ["--layers", "1", "--batch", "2", "--context", "40", "--chunk", "32", "--prefix", "32"]
    assert main(["bench", "rank-slice", "--tiny", *sizes, "--limit-s", "1", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "rank_slice.json").read_text())
    assert report["left_out"] == ["prefill, 32 tokens after 32", "decode, batch 2, context 40"]
    assert not report["cases"] and "left out for want of time" in capsys.readouterr().out


def test_options_of_bench_are_refused_where_they_would_be_lost(capsys):
    for before in (["--tp", "8"], ["--cache-dtype", "fp8", "--out", "rank-slice"]):
        assert main(["bench", *before, "rank-slice", "--tiny"]) == 2
        assert f"{' '.join(before)}: rank-slice has options of its own" in capsys.readouterr().err
    parsed = build_parser().parse_args(["bench", "rank-slice", "--tp", "4"])
    assert parsed.tp == 4 and parsed.command == "bench" and not hasattr(parsed, "model")
    assert build_parser().parse_args(["bench", "--out", "rank-slice"]).benchmark is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "8"], "--rank = 8: must be within 0..7"),
        (["--layers", "61"], "--layers = 61: must be within 1..60"),
        (["--ep", "3"], "expert = 3: must be a divisor or a multiple of tensor * attention_data = 8"),
        (["--context", "2000000"], "must be less than 1048576"),
        (["--batch", "0"], "--batch: must be an integer >= 1, got '0'"),
    ],
)
def test_sizes_that_cannot_be(arguments, message, tmp_path, capsys):
    assert main(["bench", "rank-slice", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
