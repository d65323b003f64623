"""`minimax-jax quantize`: the vendor's MXFP8 layout from floats, the same bytes each time, whole or not at all."""

import json
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from checkpoint_samples import BF16, E4M3, random_state, small_config, vendor_tensors, write_checkpoint

from minimax_jax.checkpoint import (
    CheckpointError,
    CheckpointFiles,
    check_checkpoint,
    dequantize_mxfp8,
    quantize_mxfp8,
    save_state,
)
from minimax_jax.checkpoint import quantize as quantize_module
from minimax_jax.checkpoint.quantize import quantize_checkpoint
from minimax_jax.cli import main
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.tensor_table import tensor_table


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """One model in both name styles."""
    folder, config = tmp_path_factory.mktemp("floats"), small_config()
    for style in ("vendor", "transformers"):
        save_state(random_state(config), config, folder / style, style=style)
    return {style: folder / style for style in ("vendor", "transformers")}


def stored(directory: Path) -> dict[str, np.ndarray]:
    with CheckpointFiles.open(directory) as files:
        return {name: np.array(files.read(name)) for name in files.names()}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_vendors_layout_from_either_style(sources, tmp_path):
    done = quantize_checkpoint(sources["vendor"], tmp_path / "one")
    quantize_checkpoint(sources["transformers"], tmp_path / "other")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    config = MiniMaxM3Config.from_pretrained(tmp_path / "one")
    assert config.is_mxfp8 and "language_model.model.layers.2.block_sparse_moe.gate" in config.quantization[
        "ignored_layers"
    ]  # fmt: skip
    table, found = tensor_table(config), stored(tmp_path / "one")
    assert {name: tensor.shape for name, tensor in found.items()} == {name: spec.shape for name, spec in table.items()}
    assert done.tensors == sum(spec.dtype == "F8_E4M3" for spec in table.values())
    assert done.bytes_after == sum(spec.num_bytes for spec in table.values())
    assert check_checkpoint(tmp_path / "one", read_values=True).ok
    for name, before in stored(sources["vendor"]).items():
        if found[name].dtype != E4M3:
            assert found[name].tobytes() == before.tobytes(), name
            continue
        after = dequantize_mxfp8(found[name], found[name + "_scale_inv"])
        blocks = before.astype(np.float32).reshape(-1, 32)
        power = 2.0 ** np.floor(np.log2(np.abs(blocks).max(1, keepdims=True)))
        # half of e4m3's step near the block's largest value, more where that is cut off at 448 = 1.75 * 2^8
        most = np.where(np.abs(blocks) > 1.75 * power, power / 4, power / 16)
        assert (np.abs(after.reshape(-1, 32) - blocks) <= most).all()


def test_float32_is_rounded_once(tmp_path):
    config = small_config()
    state = {
        name: np.asarray(x).astype(np.float32) * np.float32(1 + 2**-9 + 2**-12)
        for name, x in random_state(config).items()
    }
    save_state(state, config, tmp_path / "in", style="vendor")
    done = quantize_checkpoint(tmp_path / "in", tmp_path / "out")
    before, after = stored(tmp_path / "in"), stored(tmp_path / "out")
    assert done.bytes_before == sum(tensor.nbytes for tensor in before.values())
    for name in (name for name, tensor in after.items() if tensor.dtype == E4M3):
        values, scales = quantize_mxfp8(before[name])
        assert after[name].tobytes() == values.tobytes() and after[name + "_scale_inv"].tobytes() == scales.tobytes()


def test_shards_and_everything_else_again_in_the_same_bytes(tmp_path):
    config = small_config(vision=MiniMaxM3Config.m3().vision)
    tensors = vendor_tensors(small_config())
    vision = {"vision_tower.vision_model.pre_layrnorm.weight": np.arange(5, dtype=np.float32).astype(BF16)}
    drafts = {"model.mtp.layers.0.eh_proj.weight": np.ones((32, 64), BF16)}
    write_checkpoint(tmp_path / "in", tensors | vision | drafts)
    (tmp_path / "in" / "config.json").write_text(json.dumps(config.to_dict("vendor")))
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    for name in ("LICENSE", "README.md"):
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "out").mkdir()
    for out in ("out", "again"):
        quantize_checkpoint(tmp_path / "in", tmp_path / out, max_shard_bytes=1e5)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    found = stored(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found) and len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert found[next(iter(vision))].tobytes() == vision[next(iter(vision))].tobytes()
    assert found[next(iter(drafts))].dtype == BF16
    assert MiniMaxM3Config.from_pretrained(tmp_path / "out").quantization["ignored_layers"][-1] == "mtp"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert all((tmp_path / "out" / name).read_text() == name for name in ("LICENSE", "README.md"))
    assert MiniMaxM3Config.from_pretrained(tmp_path / "out").vision == config.vision
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "in", "out"]


def test_an_interrupted_run_leaves_nothing(sources, tmp_path, monkeypatch):
    write, calls = quantize_module.write_shard, []

    def interrupted(arrays, path):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(arrays, path)

    monkeypatch.setattr(quantize_module, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(sources["vendor"], tmp_path / "out", max_shard_bytes=1e4)
    assert len(calls) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("interrupts")
def test_signals_that_end_a_process_leave_nothing(sources, tmp_path, monkeypatch, capsys, number):
    handler = signal.getsignal(number)
    monkeypatch.setattr(quantize_module, "write_shard", lambda arrays, path: os.kill(os.getpid(), number))
    assert main(["quantize", str(sources["vendor"]), str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert signal.getsignal(number) is handler


def test_what_a_killed_run_left_is_removed_but_not_a_running_ones(sources, tmp_path):
    for name in (".out.partial-dead", ".out.partial-live", ".other.partial-dead"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"part")
    with quantize_module._lock(tmp_path / ".out.partial-live"):
        quantize_checkpoint(sources["vendor"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial-dead", ".out.partial-live", "out"]


def test_what_cannot_be_done_is_said_before_anything_is_written(sources, tmp_path, monkeypatch, capsys):
    assert main(["quantize", str(sources["vendor"]), str(tmp_path / "out"), "--format", "mxfp8"]) == 0
    assert "tensors quantised" in capsys.readouterr().out
    assert main(["quantize", str(tmp_path / "out"), str(tmp_path / "more")]) == 2
    assert "is quantised already (mxfp8): must be a checkpoint in floats" in capsys.readouterr().err
    assert main(["quantize", str(sources["vendor"]), str(tmp_path / "out")]) == 2
    assert "must be a new or an empty directory" in capsys.readouterr().err
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert main(["quantize", str(sources["vendor"]), str(tmp_path / "more")]) == 2
    assert "the disk has 0.0 GB free" in capsys.readouterr().err
    odd = small_config(dense_intermediate_size=40)
    save_state(random_state(odd), odd, tmp_path / "odd", style="vendor")
    with pytest.raises(CheckpointError, match=r"down_proj.weight: 40 inputs: MXFP8 needs a multiple of 32"):
        quantize_checkpoint(tmp_path / "odd", tmp_path / "more")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd", "out"]
