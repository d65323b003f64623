"""Saving: both styles load again bit for bit, shards, and a crash leaves no half checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_samples import (
    BF16,
    assert_same_state,
    mxfp8_config,
    random_state,
    small_config,
    vendor_tensors,
    write_checkpoint,
)
from safetensors import safe_open

from minimax_jax.checkpoint import CheckpointError, check_checkpoint, load_state, save_state
from minimax_jax.checkpoint import save as save_module
from minimax_jax.config import MiniMaxM3Config


def load(directory: Path, dtype: str = "bfloat16") -> dict[str, jax.Array]:
    return load_state(directory, MiniMaxM3Config.from_pretrained(directory), dtype, progress=False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("limit", [5e9, 20_000, 1])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)])
@pytest.mark.parametrize("style", ["vendor", "transformers"])
def test_what_is_saved_loads_bit_for_bit(tmp_path: Path, style: str, dtype: np.dtype, limit: float, tied: bool) -> None:
    config = small_config(tie_word_embeddings=tied)
    state = random_state(config, dtype)
    save_state(jax.device_put(state), config, tmp_path / "out", style=style, max_shard_bytes=limit)
    assert_same_state(load(tmp_path / "out", dtype.name), state)
    assert MiniMaxM3Config.from_pretrained(tmp_path / "out") == config
    report = check_checkpoint(tmp_path / "out", read_values=True)
    assert report.ok and report.style == style
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = tmp_path / "out" / "model.safetensors.index.json"
    if limit == 5e9:
        assert shards == ["model.safetensors"] and not index.exists()
        return
    content = json.loads(index.read_text())
    assert sorted(set(content["weight_map"].values())) == shards and len(content["weight_map"]) == report.tensors
    assert content["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    for shard in shards:
        with safe_open(tmp_path / "out" / shard, "np") as file:
            sizes = [int(np.prod(file.get_slice(k).get_shape())) * 2 for k in file.keys()]  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
            assert len(sizes) == 1 or sum(sizes) <= limit
    if limit == 1:
        assert len(shards) == report.tensors


def test_vendor_names_and_dtypes(tmp_path: Path) -> None:
    config = small_config()
    save_state(random_state(config), config, tmp_path, style="vendor")
    expected = {name: (value.shape, value.dtype.name) for name, value in vendor_tensors(config).items()}
    with safe_open(tmp_path / "model.safetensors", "flax") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: (value.shape, value.dtype.name) for name, value in stored.items()} == expected


def test_what_is_in_floats_of_a_state_in_8_bits_is_named(tmp_path: Path) -> None:
    config = mxfp8_config()
    write_checkpoint(tmp_path / "in", vendor_tensors(config))
    state = load_state(tmp_path / "in", config, progress=False)
    plain = random_state(small_config())
    layer = "layers.1.mlp."
    mixed = state | {layer + name: plain[layer + name] for name in ("shared_experts.gate_up_proj", "experts.down_proj")}
    for name, tensors in (("kept", state), ("mixed", mixed)):
        save_state(tensors, config, tmp_path / name, style="vendor")
    ignored = {
        name: MiniMaxM3Config.from_pretrained(tmp_path / name).quantization["ignored_layers"]
        for name in ("kept", "mixed")
    }
    file = "language_model.model.layers.1.block_sparse_moe."
    floats = [f"{file}experts.{expert}.w2" for expert in range(4)]
    floats += [f"{file}shared_experts.{part}_proj" for part in ("gate", "up")]
    assert ignored["mixed"] == [*ignored["kept"], *floats]
    jax.tree.map(np.testing.assert_array_equal, load_state(tmp_path / "mixed", config, progress=False), mixed)


def test_a_multimodal_mxfp8_configuration_is_saved_as_the_text_model_it_is(tmp_path: Path) -> None:
    config = small_config(
        vision=MiniMaxM3Config.m3().vision,
        quantization={"quant_method": "mxfp8"},
        extra={"dtype": "float16", "keep": 1, "wrapper": {"torch_dtype": "float16", "image_token_index": 5}},
    )
    state = random_state(small_config(), np.dtype(np.float32))
    for style in ("vendor", "transformers"):
        save_state(state, config, tmp_path / style, style=style)
        assert_same_state(load(tmp_path / style, "float32"), state)
        content = json.loads((tmp_path / style / "config.json").read_text())
        assert "quantization_config" not in content and "vision_config" not in content
        assert content["dtype" if style == "transformers" else "torch_dtype"] == "float32"
        text = content.get("text_config", content)
        assert text["keep"] == 1 and text.get("dtype") != "float16"


TWO_DEVICES = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
from checkpoint_samples import assert_same_state, random_state, small_config
from minimax_jax.checkpoint import load_state, save_state
config = small_config()
state = random_state(config)
mesh = jax.make_mesh((2,), ("x",))
split, copied = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis)) for axis in ("x", None))
arrays = {name: jax.device_put(value, copied if "gate" in name else split) for name, value in state.items()}
save_state(arrays, config, sys.argv[2])
assert len(arrays["embed_tokens"].sharding.device_set) == 2
for array in arrays.values():  # else the host would hold the whole model after saving it
    assert array._npy_value is None and all(shard.data._npy_value is None for shard in array.addressable_shards)
assert_same_state(load_state(sys.argv[2], config, progress=False), state)
assert_same_state(load_state(sys.argv[2], config, device=copied, progress=False), state)
"""


def test_arrays_over_several_devices_are_saved_whole_and_nothing_stays_cached(tmp_path: Path) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", TWO_DEVICES, str(Path(__file__).parent), str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), "norm.weight: missing (shape [64])"),
        (lambda s: s.update(extra=np.zeros(2, BF16)), "extra: unexpected"),
        (lambda s: s.update({"norm.weight": np.zeros(3, BF16)}), "norm.weight: shape [3]: must be [64]"),
        (lambda s: s.update({"norm.weight": np.zeros(64)}), "norm.weight: dtype float64: must be bfloat16 or float32"),
        (
            lambda s: s.update({"layers.1.mlp.gate.weight": np.zeros((64, 4), BF16)}),
            "layers.1.mlp.gate.weight: dtype bfloat16: must be float32",
        ),
    ],
)
def test_a_state_of_another_model_is_refused(tmp_path: Path, change, message: str) -> None:
    state = random_state(small_config())
    change(state)
    with pytest.raises(CheckpointError) as caught:
        save_state(state, small_config(), tmp_path / "out")
    assert caught.value.problems == (message,)
    assert not (tmp_path / "out").exists()


def test_arguments(tmp_path: Path) -> None:
    state = random_state(small_config())
    with pytest.raises(ValueError, match="style = 'gguf'"):
        save_state(state, small_config(), tmp_path, style="gguf")
    for limit in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="max_shard_bytes"):
            save_state(state, small_config(), tmp_path, max_shard_bytes=limit)


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    save_state(random_state(small_config()), small_config(), tmp_path / "out")
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in [*(tmp_path / "out").iterdir(), tmp_path / "plain"]}
    assert len(modes) == 1


def test_a_new_save_replaces_the_old_one_and_leaves_other_files(tmp_path: Path) -> None:
    config = small_config()
    (tmp_path / "tokenizer.json").write_text("{}")
    first, second = random_state(config, seed=1), random_state(config, seed=2)
    save_state(first, config, tmp_path, max_shard_bytes=20_000)
    save_state(second, config, tmp_path, style="vendor")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_same_state(load(tmp_path), second)
    save_state(first, config, tmp_path, max_shard_bytes=100_000)
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_state(load(tmp_path), first)


def test_a_checkpoint_can_be_saved_over_the_one_that_it_was_loaded_from(tmp_path: Path) -> None:
    config = small_config()
    save_state(random_state(config), config, tmp_path)
    state = load(tmp_path)
    save_state(state, config, tmp_path)
    assert_same_state(load(tmp_path), state)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], existing: bool
) -> None:
    config = small_config()
    target = tmp_path / "out"
    first = random_state(config, seed=1)
    if existing:
        save_state(first, config, target)
    write, written = save_module.write_shard, []

    def failing_write(arrays: dict, path: Path) -> None:
        if len(written) == 3:
            raise error("disk full")
        written.append(path)
        write(arrays, path)

    monkeypatch.setattr(save_module, "write_shard", failing_write)
    with pytest.raises(error):
        save_state(random_state(config, seed=2), config, target, max_shard_bytes=20_000)
    assert len(written) == 3
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existing else [])
    if existing:
        assert sorted(p.name for p in target.iterdir()) == ["config.json", "model.safetensors"]
        assert_same_state(load(target), first)


def test_a_crash_between_renames_never_mixes_old_and_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any step of replacing one checkpoint by another: the old, the new, or an error; no mixture."""
    config, changed = small_config(), small_config(rope_theta=1e4)
    first, second = random_state(config, seed=1), random_state(config, seed=2)
    save_state(first, config, tmp_path / "first", max_shard_bytes=100_000)
    steps = ("rename", "replace", "unlink")
    outcomes = []
    for survivors in range(100):
        target = tmp_path / f"out{survivors}"
        shutil.copytree(tmp_path / "first", target)
        left = [survivors]
        with monkeypatch.context() as patched:
            for step in steps:
                patched.setattr(os, step, _crashing(getattr(os, step), left))
            patched.setattr(shutil, "rmtree", lambda *_, **__: None)  # a dead process cleans nothing up
            try:
                save_state(second, changed, target, max_shard_bytes=100_000)
            except _Killed:
                finished = False
            else:
                finished = True
        try:
            state = load(target)
        except CheckpointError:
            outcomes.append("error")
        else:
            is_old = np.array_equal(state["norm.weight"], first["norm.weight"])
            assert_same_state(state, first if is_old else second)
            assert MiniMaxM3Config.from_pretrained(target) == (config if is_old else changed)
            outcomes.append("old" if is_old else "new")
        if finished:
            break
    assert outcomes[0] == "old" and outcomes[-1] == "new" and "error" in outcomes and finished


class _Killed(BaseException):
    pass


def _crashing(step, left: list[int]):
    def wrapped(*arguments: object, **options: object) -> object:
        if left[0] == 0:
            raise _Killed
        left[0] -= 1
        return step(*arguments, **options)

    return wrapped
