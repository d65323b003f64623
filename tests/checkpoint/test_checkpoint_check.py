"""The check behind `minimax-jax inspect`: it reports, by name, and never raises for bad content."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_samples import BF16, mxfp8_config, small_config, vendor_tensors, write_checkpoint

from minimax_jax.checkpoint import NonFinite, check_checkpoint
from minimax_jax.config import MiniMaxM3Config

BODY = "language_model.model."


def write(directory: Path, config: MiniMaxM3Config, tensors: dict[str, np.ndarray]) -> None:
    write_checkpoint(directory, tensors)
    (directory / "config.json").write_text(json.dumps(config.to_dict()))


def test_a_sound_checkpoint(tmp_path: Path) -> None:
    config = small_config()
    tensors = vendor_tensors(config)
    tensors["vision_tower.vision_model.pre_layrnorm.weight"] = np.zeros(3, np.float32)
    write(tmp_path, config, tensors)
    report = check_checkpoint(tmp_path, read_values=True)
    assert report.ok and report.problems == () and report.values_read and report.style == "vendor"
    assert report.tensors == len(tensors) and report.ignored == 1
    sizes: dict[str, int] = {}
    for value in tensors.values():
        key = {"bfloat16": "BF16", "float32": "F32"}[value.dtype.name]
        sizes[key] = sizes.get(key, 0) + value.nbytes
    assert report.bytes_by_dtype == sizes and list(report.bytes_by_dtype) == ["BF16", "F32"]


@pytest.mark.parametrize("dtype", [np.float16, BF16, np.float32, ml_dtypes.float8_e5m2])
def test_names_tensors_with_nan_and_inf(tmp_path: Path, dtype: np.dtype) -> None:
    config = small_config()
    tensors = vendor_tensors(config)
    bad = np.zeros(64, dtype)
    bad[[3, 5, 63]] = np.array([np.nan, -np.inf, np.nan]).astype(dtype)
    tensors[f"{BODY}norm.weight"] = bad
    write(tmp_path, config, tensors)
    report = check_checkpoint(tmp_path, read_values=True)
    assert report.non_finite == {f"{BODY}norm.weight": NonFinite(nan=2, inf=1, size=64)} and not report.ok
    assert f"{BODY}norm.weight: 2 NaN and 1 infinite of 64 values" in report.problems
    quick = check_checkpoint(tmp_path)
    assert quick.non_finite == {} and not quick.values_read


def test_names_mxfp8_values_and_scales_that_are_nan(tmp_path: Path) -> None:
    config = mxfp8_config()
    tensors = vendor_tensors(config)
    name = f"{BODY}layers.0.self_attn.q_proj.weight"
    tensors[name].view(np.uint8)[1, :2] = (0x7F, 0xFF)
    tensors[name + "_scale_inv"][5, 0] = 255
    write(tmp_path, config, tensors)
    report = check_checkpoint(tmp_path, read_values=True)
    assert report.non_finite == {name: NonFinite(2, 0, 128 * 64), name + "_scale_inv": NonFinite(1, 0, 128 * 2)}


def test_lists_all_that_does_not_fit(tmp_path: Path) -> None:
    config = small_config()
    tensors = vendor_tensors(config)
    del tensors[f"{BODY}norm.weight"]
    tensors[f"{BODY}extra"] = np.zeros(1, BF16)
    tensors[f"{BODY}embed_tokens.weight"] = np.zeros((95, 64), BF16)
    tensors[f"{BODY}layers.0.input_layernorm.weight"] = np.zeros(64, np.int64)
    write(tmp_path, config, tensors)
    report = check_checkpoint(tmp_path)
    assert report.missing == (f"{BODY}norm.weight: missing (shape [64])",)
    assert report.extra == (f"{BODY}extra: unexpected",)
    assert report.misshapen == (f"{BODY}embed_tokens.weight: shape [95, 64]: must be [96, 64]",)
    assert report.wrong_dtype == (f"{BODY}layers.0.input_layernorm.weight: dtype I64: must be BF16 or F16 or F32",)
    assert len(report.problems) == 4 and not report.ok


def test_reports_what_cannot_be_read(tmp_path: Path) -> None:
    config = small_config()
    tensors = vendor_tensors(config)
    names = list(tensors)
    write_checkpoint(tmp_path, {n: tensors[n] for n in names[:20]}, "model-00001-of-00002.safetensors")
    write_checkpoint(tmp_path, {n: tensors[n] for n in names[20:]}, "model-00002-of-00002.safetensors")
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    report = check_checkpoint(tmp_path, read_values=True)
    assert len(report.bad_files) == 2 and not report.ok and report.tensors == 20
    assert report.bad_files[0].startswith(shard.name) and "truncated" in report.bad_files[0]
    assert "config.json: no such file" in report.bad_files[1]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    report = check_checkpoint(tmp_path)
    assert len(report.bad_files) == 1 and len(report.missing) == len(names) - 20


@pytest.mark.parametrize("content", ["{oops", "[]", '{"model_type": "llama"}'])
def test_a_bad_config_is_one_of_the_findings(tmp_path: Path, content: str) -> None:
    write_checkpoint(tmp_path, vendor_tensors(small_config()))
    (tmp_path / "config.json").write_text(content)
    report = check_checkpoint(tmp_path)
    assert len(report.bad_files) == 1 and "config.json" in report.bad_files[0] and report.style == "vendor"


def test_nothing_there(tmp_path: Path) -> None:
    assert "no such model directory" in check_checkpoint(tmp_path / "none").bad_files[0]
    report = check_checkpoint(tmp_path)
    assert any("no weights" in line for line in report.bad_files) and report.style is None
    write_checkpoint(tmp_path, {"wte": np.zeros(2, np.float32)})
    assert any("no tensor name" in line for line in check_checkpoint(tmp_path).bad_files)
