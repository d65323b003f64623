"""Loading: what arrives, what is refused before anything is taken, memory, interruption."""

import json
import shutil
import struct
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_samples import (
    BF16,
    assert_same_state,
    cast_state,
    mxfp8_config,
    random_state,
    small_config,
    vendor_state,
    vendor_tensors,
    write_checkpoint,
)

from minimax_jax.checkpoint import CheckpointError, LoadPlan, load_state, plan_load
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.tensor_table import tensor_table

LAYER = "language_model.model.layers."


@pytest.mark.parametrize("stored", [np.dtype(np.float32), np.dtype(np.float16), BF16])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_casts_round_to_nearest_even_and_the_router_stays_float32(tmp_path: Path, stored: np.dtype, dtype: str) -> None:
    config = small_config()
    tensors = {name: value.astype(stored) for name, value in vendor_tensors(config).items()}
    ties = np.float32(1) + np.arange(64, dtype=np.float32) * 2.0**-8  # halfway between bfloat16 neighbours
    tensors["language_model.model.norm.weight"] = ties.astype(stored)
    write_checkpoint(tmp_path, tensors)
    state = load_state(tmp_path, config, dtype, progress=False)
    assert all(isinstance(array, jax.Array) for array in state.values())
    assert_same_state(state, cast_state(vendor_state(config, tensors), np.dtype(getattr(ml_dtypes, dtype, dtype))))
    if dtype == "bfloat16" and stored != BF16:
        bits = np.asarray(state["norm.weight"]).view(np.uint16)
        assert bits[1] == 0x3F80 and bits[3] == 0x3F82 and (bits[1::2] % 2 == 0).all()  # ties to even


def test_sharded_and_with_vision_projector_and_draft_tensors(tmp_path: Path) -> None:
    config = small_config()
    tensors = vendor_tensors(config)
    expected = cast_state(vendor_state(config, tensors), BF16)
    others = ["vision_tower.vision_model.pre_layrnorm.weight", "multi_modal_projector.linear_1.bias"]
    others += ["patch_merge_mlp.linear_1.weight", "model.mtp.layers.0.enorm.weight"]
    tensors.update({name: np.zeros(2, np.int8) for name in others})
    names = sorted(tensors)
    for part in range(3):
        write_checkpoint(tmp_path, {n: tensors[n] for n in names[part::3]}, f"part-{part}.safetensors")
    assert_same_state(load_state(tmp_path, config, progress=False), expected)


def test_tied_embeddings(tmp_path: Path) -> None:
    config = small_config(tie_word_embeddings=True)
    tensors = vendor_tensors(config)
    write_checkpoint(tmp_path, tensors)
    state = load_state(tmp_path, config, progress=False)
    assert "lm_head" not in state
    assert_same_state(state, cast_state(vendor_state(config, tensors), BF16))
    embedding = tensors["language_model.model.embed_tokens.weight"]
    tensors["language_model.lm_head.weight"] = embedding.copy()  # what some writers do; it says the same
    write_checkpoint(tmp_path, tensors)
    assert "lm_head" not in load_state(tmp_path, config, progress=False)
    tensors["language_model.lm_head.weight"] = embedding + BF16.type(1)
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"lm_head.weight: differs from .*embed_tokens.weight, but .* ties"):
        load_state(tmp_path, config)


def test_every_problem_in_one_error_before_any_device_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config()
    tensors = vendor_tensors(config)
    del tensors[f"{LAYER}1.block_sparse_moe.experts.2.w3.weight"]
    del tensors["language_model.lm_head.weight"]
    tensors[f"{LAYER}0.mlp.bias"] = np.zeros(3, np.float32)
    tensors[f"{LAYER}0.self_attn.q_proj.weight"] = np.zeros((64, 128), BF16)  # transposed
    tensors[f"{LAYER}2.self_attn.index_k_norm.weight"] = np.zeros(16, np.int32)
    write_checkpoint(tmp_path, tensors)
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("device memory was taken"))
    with pytest.raises(CheckpointError) as caught:
        load_state(tmp_path, config)
    assert caught.value.problems == (
        f"{LAYER}1.block_sparse_moe.experts.2.w3.weight: missing (shape [32, 64])",
        "language_model.lm_head.weight: missing (shape [96, 64])",
        f"{LAYER}0.self_attn.q_proj.weight: shape [64, 128]: must be [128, 64]",
        f"{LAYER}2.self_attn.index_k_norm.weight: dtype I32: must be BF16 or F16 or F32",
        f"{LAYER}0.mlp.bias: unexpected",
    )
    assert all(problem in str(caught.value) for problem in caught.value.problems)


@pytest.mark.parametrize("damage", ["truncated", "header", "gone"])
def test_a_damaged_shard_is_an_error_before_any_device_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    config = small_config()
    write_checkpoint(tmp_path, vendor_tensors(config))
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-1000])
    elif damage == "header":
        path.write_bytes(content[:20] + b"\x00" + content[21:])
    else:
        path.unlink()
    monkeypatch.setattr(jax, "device_put", lambda *_: pytest.fail("device memory was taken"))
    with pytest.raises(
        CheckpointError, match={"truncated": "truncated", "header": "JSON", "gone": "no weights"}[damage]
    ):
        load_state(tmp_path, config)


def test_a_config_of_another_model_lists_twenty_and_counts_the_rest(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, vendor_tensors(small_config()))
    with pytest.raises(CheckpointError) as caught:
        plan_load(tmp_path, small_config(hidden_size=128))
    assert len(caught.value.problems) > 50
    assert len(str(caught.value).splitlines()) == 22 and "more" in str(caught.value).splitlines()[-1]


def test_names_of_no_style_other_dtypes_and_no_directory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"transformer.wte.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match="no tensor name starts as MiniMax-M3's do"):
        plan_load(tmp_path, small_config())
    with pytest.raises(ValueError, match="dtype = 'float16': must be 'bfloat16' or 'float32'"):
        plan_load(tmp_path, small_config(), np.float16)
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        load_state(tmp_path / "none", small_config())


def test_device_and_dtype_forms(tmp_path: Path) -> None:
    config = small_config()
    write_checkpoint(tmp_path, vendor_tensors(config))
    device = jax.devices()[-1]
    state = load_state(tmp_path, config, jax.numpy.bfloat16, device=device, progress=False)
    assert all(array.devices() == {device} for array in state.values())
    sharding = jax.sharding.SingleDeviceSharding(device)
    again = load_state(tmp_path, config, BF16, device=sharding, progress=False)
    assert_same_state(again, state)


def test_the_state_does_not_hang_on_the_file(tmp_path: Path) -> None:
    config = small_config()
    tensors = vendor_tensors(config)
    write_checkpoint(tmp_path, tensors)
    state = load_state(tmp_path, config, progress=False)
    path = tmp_path / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_state(state, cast_state(vendor_state(config, tensors), BF16))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_load_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    config = small_config()
    write_checkpoint(tmp_path, vendor_tensors(config))
    read, put, taken = LoadPlan.read, jax.device_put, []

    def failing_read(self: LoadPlan, name: str, **arguments: object) -> np.ndarray:
        if len(taken) == 10:
            raise error
        return read(self, name, **arguments)

    def counting_put(*arguments: object) -> jax.Array:
        taken.append(put(*arguments))
        return taken[-1]

    monkeypatch.setattr(LoadPlan, "read", failing_read)
    monkeypatch.setattr(jax, "device_put", counting_put)
    with pytest.raises(error) as caught:
        load_state(tmp_path, config)
    assert caught.tb is not None  # the traceback is alive, as in an interactive session
    assert len(taken) == 10 and all(array.is_deleted() for array in taken)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("load")]


def test_a_load_that_ends_at_the_scales_leaves_no_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mxfp8_config()
    write_checkpoint(tmp_path, vendor_tensors(config))
    put, taken = jax.device_put, []

    def counting_put(*arguments: object) -> jax.Array:
        taken.append(put(*arguments))
        return taken[-1]

    def failing_read(self: LoadPlan, name: str, **arguments: object) -> np.ndarray:
        raise KeyboardInterrupt

    monkeypatch.setattr(LoadPlan, "read_scales", failing_read)
    monkeypatch.setattr(jax, "device_put", counting_put)
    with pytest.raises(KeyboardInterrupt) as caught:
        load_state(tmp_path, config)
    assert caught.tb is not None and taken[-1].dtype == jax.numpy.float8_e4m3fn
    assert all(array.is_deleted() for array in taken)


def test_progress_goes_to_stderr_and_can_be_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config()
    write_checkpoint(tmp_path, vendor_tensors(config))
    load_state(tmp_path, config)  # quick: nothing to show
    monkeypatch.setattr("minimax_jax.checkpoint.load._PROGRESS_DELAY", 0)
    load_state(tmp_path, config, progress=False)
    assert capsys.readouterr() == ("", "")
    load_state(tmp_path, config)
    shown = capsys.readouterr()
    assert "Loading weights" in shown.err and not shown.out


@pytest.mark.parametrize(("config", "tensors"), [(MiniMaxM3Config.m3(), 23_416), (MiniMaxM3Config.m3_mxfp8(), 45_838)])
def test_the_released_checkpoints_at_full_size(tmp_path: Path, config: MiniMaxM3Config, tensors: int) -> None:
    """Every tensor of the real layouts, in shards with an index; the data are holes in the files."""
    table = tensor_table(config)
    assert len(table) == tensors
    names, weight_map = list(table), {}
    for number in range(31):
        shard = f"model-{number + 1:05d}-of-00031.safetensors"
        header, end = {}, 0
        for name in names[number::31]:
            begin, end = end, end + table[name].num_bytes
            header[name] = {"dtype": table[name].dtype, "shape": table[name].shape, "data_offsets": [begin, end]}
            weight_map[name] = shard
        text = json.dumps(header).encode()
        with open(tmp_path / shard, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with plan_load(tmp_path, config) as plan:
        assert (440e9 < plan.num_bytes < 444e9) == config.is_mxfp8  # in 8 bits, without the vision tower
    with plan_load(tmp_path, config, quantization="none") as plan:
        assert plan.style.name == "vendor"
        assert 840e9 < plan.num_bytes < 855e9  # bfloat16, without the vision tower
        expert = plan.read("layers.59.mlp.experts.gate_up_proj", ((127, 128), (6080, 6144), (3000, 3100)))
        assert expert.shape == (1, 64, 100) and not expert.any()
    (tmp_path / "model-00007-of-00031.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00007-of-00031\.safetensors: cannot be opened"):
        plan_load(tmp_path, config)


MEASURE = """
import sys, pathlib, re
sys.path.insert(0, sys.argv[3])
from minimax_jax.checkpoint import load_state, plan_load
from minimax_jax.config import MiniMaxM3Config
from checkpoint_samples import small_config
def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) << 10
small, big = sys.argv[1:3]
load_state(small, small_config(), progress=False)  # what JAX itself takes
config = MiniMaxM3Config.from_pretrained(big)
before = status("VmRSS")
state = load_state(big, config, sys.argv[4], progress=False)
kept = sum(array.nbytes for array in state.values())
print(kept, max(array.nbytes for array in state.values()), status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("stored", [BF16, np.dtype(np.float32)])
def test_host_memory_is_what_is_kept_and_one_tensor(tmp_path: Path, stored: np.dtype) -> None:
    """On a CPU the kept arrays count too; the file's pages and a second copy of the model must not."""
    write_checkpoint(tmp_path / "small", vendor_tensors(small_config()))
    config = small_config(
        hidden_size=1024, vocab_size=8192, intermediate_size=768, shared_intermediate_size=768,
        num_local_experts=48 // stored.itemsize, dense_intermediate_size=4096,
    )  # fmt: skip
    write_checkpoint(tmp_path / "big", {n: np.full(s.shape, 0.5, stored) for n, s in tensor_table(config).items()})
    (tmp_path / "big" / "config.json").write_text(json.dumps(config.to_dict()))
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "big"), here, "bfloat16"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, largest, taken = map(int, result.stdout.split())
    allowed = kept + largest + (48 << 20)
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    shutil.rmtree(tmp_path / "big")  # pytest would keep it for three sessions
    assert size > 250e6 and kept + size > allowed + 100e6  # holding on to the file would not pass
    assert taken < allowed, (kept, largest, taken)


def test_reading_one_tensor_allocates_one_tensor(tmp_path: Path) -> None:
    config = small_config(vocab_size=200_000)
    write_checkpoint(tmp_path, vendor_tensors(config))
    with plan_load(tmp_path, config) as plan:
        tracemalloc.start()
        try:
            array = plan.read("lm_head")  # [64, 200000], transposed from the file
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            part = plan.read("lm_head", ((0, 64), (1000, 1100)))
            _, peak_of_part = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert array.nbytes == 25_600_000 and peak < array.nbytes + 1e6
    assert peak_of_part - array.nbytes < 1e6
    np.testing.assert_array_equal(part, array[:, 1000:1100])


def test_random_states_differ() -> None:
    """The helper itself: a constant state would hide transposed and swapped tensors."""
    state = random_state(small_config())
    gate_up = np.asarray(state["layers.1.mlp.experts.gate_up_proj"], np.float32)
    assert len(np.unique(gate_up)) > 1000
