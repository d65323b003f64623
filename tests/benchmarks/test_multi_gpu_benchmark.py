"""The benchmark over several GPUs: what fits, who gets what, what a profile says; and all of it on CPU devices."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.multi_gpu.collective_share import collective_share, is_collective
from benchmarks.multi_gpu.compile_log import saying_compiles
from benchmarks.multi_gpu.full_width import TINY, Executables, FullWidth
from benchmarks.multi_gpu.mesh_model import Case
from benchmarks.multi_gpu.weights import MAKERS, layers_and_pages, model_config, rank_weight_bytes
from minimax_jax.parallel import ParallelConfig, Ranks
from minimax_jax.rank_slice.trace import Launch
from minimax_kernels import Mxfp8

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "bench_multi_gpu.py"
PARTS = ("parity", "full", "dispatch", "kill", "serve")


@pytest.mark.parametrize("sizes", [(2, 2, 1), (1, 8, 8)])
def test_as_many_layers_as_fit_and_not_one_more(sizes):
    parallel, memory, reserve = ParallelConfig(*sizes), 73 << 30, 10 << 30
    fit = layers_and_pages(parallel, memory, reserve=reserve, least_pages=4096, most_pages=16448)
    assert fit.weight_bytes == rank_weight_bytes(model_config(fit.layers), parallel)
    assert fit.weight_bytes + fit.cache_bytes + reserve <= memory and 4096 <= fit.pages <= 16448
    more = rank_weight_bytes(model_config(fit.layers + 1), parallel)
    assert more + 4096 * fit.cache_bytes // fit.pages * (fit.layers + 1) // fit.layers + reserve > memory
    with pytest.raises(ValueError, match="two layers"):
        layers_and_pages(parallel, 12 << 30, reserve=reserve, least_pages=4096, most_pages=16448)


def test_a_weight_less_wide_lets_all_layers_in():
    """MXFP8, 33 bytes for 32 weights, on eight GPUs of 80 GB."""
    fit = layers_and_pages(
        ParallelConfig(8, 8), 73 << 30, reserve=8 << 30, least_pages=100, most_pages=200, itemsize=33 / 32
    )
    assert fit.layers == 60 and fit.weight_bytes == pytest.approx(55e9, rel=0.03)


def test_model_configs_have_a_twentieth_of_dense_layers():
    assert [model_config(layers).layer_types.count("full_attention") for layers in (2, 8, 30, 60)] == [1, 1, 2, 3]


def test_requests_and_tokens_are_dealt_to_data_ranks():
    assert Case("decode", 6, 10).by_group(4) == [(2, 1), (2, 1), (1, 1), (1, 1)]
    assert Case("decode", 1, 10).by_group(4) == [(1, 1), (0, 1), (0, 1), (0, 1)]
    assert Case("prefill", 2048, 0).by_group(4) == [(1, 512)] * 4


def test_collectives_share_of_a_step():
    launches = [
        Launch("gemm", "s", 0, 10, device="a"),
        Launch("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "s", 5, 15, device="a"),
        Launch("fusion", "s", 20, 20, device="a"),
        Launch("gemm", "s", 2, 10, device="b"),
        Launch("all-gather.3", "t", 12, 5, device="b"),
        Launch("fusion", "s", 20, 22, device="b"),
    ]
    share = collective_share(launches)
    assert (share["span_us"], share["busy_us"], share["collective_us"], share["least_us"]) == (40, 38.5, 10, 5)
    assert share["alone_us"] == 7.5 and share["share"] == 0.25 and share["count"] == 1
    assert share["kernels"] == {"fusion": 20, "ncclDevKernel_AllReduce_Sum_bf16_RING_LL": 15, "gemm": 10}
    assert collective_share([]) is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>) ncclDevKernel_SendRecv", True),
        ("all-reduce.7 all_gather_3 reduce-scatter-start.1 reduce_scatter.2 all_to_all.4 ragged-all-to-all", True),
        (
            "collective-permute.1 collective_broadcast psum_119_0_fusion_1 psum.3 loop_psum_fusion pmax_2 ppermute.1",
            True,
        ),
        ("grouped_matmul_swiglu gemm_fusion_dot_general_3 add_norm loop_add_fusion nvjet_sm90_tss_128x256_64x4", False),
        (
            "input_reduce_fusion cumsum_fusion wrapped_gather loop_scatter_fusion loop_dynamic_update_slice_fusion",
            False,
        ),
    ],
)
def test_kernels_of_collectives_by_their_names(names, expected):
    assert {name: is_collective(name) for name in names.split()} == dict.fromkeys(names.split(), expected)


def test_compiled_programs_are_said_while_asked_for():
    said, x = [], jnp.ones(3)

    def doubled(x):
        return x * 2

    with saying_compiles(said.append, least_s=0.0) as totals:
        jax.jit(doubled)(x)
    jax.jit(lambda x: doubled(x) + 1)(x)
    assert totals["programs"] == len(said) == 1 and totals["seconds"] > 0
    assert said[0].startswith("    compiled ") and said[0].endswith(" s")


def test_weights_in_8_bits_are_drawn_into_their_shards():
    config = model_config(2, "tiny").replace(shared_intermediate_size=64, intermediate_size=32)
    ranks = Ranks(config, ParallelConfig(2, 2))
    state = MAKERS["mxfp8"](config, ranks, jnp.bfloat16)
    up = state["layers.1.mlp.experts.gate_up_proj"]
    assert isinstance(up, Mxfp8) and up.shape == (8, 64, 64) and up.scales.shape == (8, 64, 2)
    first, second = (shard.data for shard in up.values.addressable_shards)
    assert first.shape == second.shape == (4, 64, 64) and (np.asarray(first) != np.asarray(second)).any()
    assert not np.isnan(np.asarray(up.values).astype(np.float32)).any()
    assert state["embed_tokens"].dtype == jnp.bfloat16 and state["layers.1.mlp.gate.weight"].dtype == jnp.float32


@pytest.mark.long
def test_full_width_measures_a_small_model_both_ways():
    saved, plan = [], dataclasses.replace(TINY, split=())
    given = {"weights": "bf16", "layers": 2, "say": str, "save": saved.append, "deadline": time.monotonic() + 600}
    bench = FullWidth(ParallelConfig(2, 2), plan, **given)
    record = bench.run()
    assert record["layers"] == 2 and record["left_out"] == [] and saved
    steps = [(row["kind"], row["size"], row["past"]) for row in record["steps"]]
    assert steps == [("decode", 8, 40), ("prefill", 64, 0), ("prefill", 64, 64)]
    assert all(row["step_us"] > 0 for row in record["steps"])
    assert [row["past"] for row in record["segments"]] == [0, 64] and record["resize"]["recapture_ms"] > 0
    assert record["compiled"] > 2  # two whole steps, and segments
    # with no time left: all that was wanted is named, and nothing is measured
    steps, bench._deadline = len(saved), time.monotonic()
    late = bench.run()
    assert late["left_out"][0] == "steps: decode 8 after 40" and late["left_out"][-1] == "shared_out_index_keys"
    assert len(late["steps"]) == 3 and len(saved) == steps + len(late["left_out"])


class NeverCompiled:
    """Instead of a MeshModel: a compiler that takes for ever, until it is let go."""

    def __init__(self):
        self.let_go = threading.Event()

    def compiled(self, case):
        self.let_go.wait()


def test_nobody_waits_for_a_compiler_longer_than_there_is_time():
    model, case, begun = NeverCompiled(), Case("decode", 8, 40), time.monotonic()
    with Executables(model, lambda *_: None) as executables:
        executables.begin([case])
        for seconds in (0.2, -1.0):
            with pytest.raises(TimeoutError):
                executables.get(case, seconds)
    assert time.monotonic() - begun < 5
    model.let_go.set()


def run(*arguments, timeout):
    environment = {**os.environ}
    environment.pop("XLA_FLAGS", None)  # the script makes its own devices
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)


@pytest.mark.long
@pytest.mark.parametrize(
    ("data", "parts"), [([], PARTS), (["--attention-dp"], ("parity", "full", "serve"))], ids=["tp", "adp"]
)
def test_a_try_on_cpu_devices(tmp_path, data, parts):
    options = ["--ep", "8", *data, "--tiny", "--cpu-devices", "8", "--minutes", "0.1", "--limit-s", "1500"]
    ran = run("--tp", "8", *options, "--parts", ",".join(parts), "--out", str(tmp_path), timeout=1800)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    records = {part: json.loads((tmp_path / f"multi_gpu_{part}.json").read_text()) for part in parts}
    assert all(record["fine"] for record in records.values())
    assert records["serve"]["requests"] > 0
    if "kill" in parts:
        assert records["kill"]["named"] and {"processes_1", "processes_8"} <= set(records["dispatch"])
    assert ("all_to_all" in records["full"]) == bool(data)


def test_wrong_arguments_are_one_line(tmp_path):
    for wrong, said in (
        (["--parts", "full,fast"], "'fast' must be one of parity, full"),
        (["--tp", "3", "--weights", "int3"], "--weights = int3: must be one of mxfp8, bf16"),
    ):
        ran = run(*wrong, "--out", str(tmp_path / "none"), timeout=60)
        assert ran.returncode == 2 and said in ran.stderr.splitlines()[-1], ran.stderr
        assert not (tmp_path / "none").exists()
