"""`minimax-jax inspect`: its numbers against what is known of M3, and what it says of broken checkpoints."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minimax_jax.cli import main
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.inspect_report import TENSOR_RANKS, components, device_memory, inspect_model
from minimax_jax.inspect_text import format_bytes, render_text, table
from minimax_jax.paths import model_directory
from minimax_jax.tensor_table import cache_bytes_per_token, tensor_table

BODY = "language_model.model."
M3 = MiniMaxM3Config.m3()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint, to be broken."""
    return Path(shutil.copytree(model_directory("tiny"), tmp_path / "model"))


def rewrite(directory: Path, change) -> None:
    """Lets `change` alter the tensors of a checkpoint."""
    path = directory / "model.safetensors"
    tensors = {name: value.copy() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def inspect_json(capsys, *argv: str) -> tuple[int, dict]:
    code = main(["inspect", "--json", *argv])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, json.loads(captured.out)


def test_parameters_of_m3(capsys):
    code, report = inspect_json(capsys, "m3")
    assert code == 0 and report["ok"] and report["problems"] == {}
    assert report["parameters"]["total"] == 427_040_140_160
    rows = report["parameters"]["components"]
    assert sum(row["parameters"] for row in rows) == 427_040_140_160
    assert sum(row["active"] for row in rows) == report["parameters"]["active_per_token"]
    assert report["config"]["num_hidden_layers"] == 60
    assert sum(report["stored_bytes"].values()) == sum(spec.num_bytes for spec in tensor_table(M3).values())


def test_active_parameters_of_m3():
    """12.91B of routed experts and everything else of the layers: the 23B of the model's name."""
    active = {row.name: row.active for row in components(M3)}
    assert active["routed experts"] == 57 * 4 * 3 * 3072 * 6144
    assert active["embedding"] == active["head"] == active["vision tower"] == 0
    assert sum(active.values()) == 23_504_087_424


def text_bytes(config: MiniMaxM3Config) -> dict[str, int]:
    outside = ("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.")
    return {name: spec.num_bytes for name, spec in tensor_table(config).items() if not name.startswith(outside)}


@pytest.mark.parametrize("ranks", TENSOR_RANKS)
def test_all_devices_together_hold_every_weight_once_but_for_the_replicated_ones(ranks):
    """M3 splits without remainders, so the sum over devices is exact."""
    sizes = text_bytes(M3)
    everywhere = ("norm", "block_sparse_moe.gate.", "e_score_correction_bias", "index_k_proj")
    replicated = sum(size for name, size in sizes.items() if any(part in name for part in everywhere))
    in_four = (".k_proj.", ".v_proj.", "index_q_proj")  # 4 KV heads, 4 index heads
    shared = sum(size for name, size in sizes.items() if any(part in name for part in in_four))
    together = sum(sizes.values()) + (ranks - 1) * replicated + (max(1, ranks // 4) - 1) * shared
    assert device_memory(M3, ranks).bfloat16_bytes * ranks == together


@pytest.mark.parametrize("ranks", TENSOR_RANKS)
def test_mxfp8_weights_as_stored_and_dequantised(ranks):
    config = MiniMaxM3Config.m3_mxfp8()
    row = device_memory(config, ranks)
    assert row.bfloat16_bytes == device_memory(M3, ranks).bfloat16_bytes
    assert 0.50 < row.mxfp8_bytes / row.bfloat16_bytes < 0.53
    if ranks == 1:
        assert row.mxfp8_bytes == sum(text_bytes(config).values())


def test_cache_of_m3():
    rows = {ranks: device_memory(M3, ranks).cache_bytes_per_token for ranks in TENSOR_RANKS}
    assert rows[1] == cache_bytes_per_token(M3) == 122_880 + 14_592
    assert rows[2] == 61_440 + 14_592 and rows[4] == 30_720 + 14_592  # index keys are on every rank
    assert rows[8] == rows[4]  # 4 KV heads split four ways at most


def test_a_layout_that_cannot_be_is_explained():
    config = M3.replace(intermediate_size=3076)
    assert device_memory(config, 8).cannot_split == "intermediate_size = 3076 is no multiple of 8"
    assert device_memory(M3.replace(num_attention_heads=12), 8).cannot_split.startswith("num_attention_heads = 12")
    quantised = MiniMaxM3Config.m3_mxfp8().replace(shared_intermediate_size=128)
    assert device_memory(quantised, 8).cannot_split == "shared_intermediate_size = 128 is no multiple of 256"
    assert device_memory(M3.replace(vocab_size=200065), 8).bfloat16_bytes > 0  # the vocabulary is padded


def test_impossible_layouts_in_the_text(checkpoint, capsys):
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["shared_intermediate_size"] = 68
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(checkpoint)]) == 1
    assert "TP 8 cannot be: shared_intermediate_size = 68 is no multiple of 8" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["m3", "m3-mxfp8", "tiny"])
def test_text_is_aligned_and_has_the_numbers(name, capsys):
    assert main(["inspect", name]) == 0
    text = capsys.readouterr().out
    for title in ("Configuration", "Parameters", "Memory per device", "Stored"):
        assert f"\n{title}" in text
    if name != "tiny":
        assert "427,040,140,160" in text and "137,472 B" in text
    assert all(len(line) <= 120 for line in text.splitlines())
    lines = text.splitlines()
    first = lines.index("Parameters") + 1
    rows = lines[first : lines.index("", first)]
    assert len({len(row) for row in rows}) == 1


def test_sound_checkpoint_with_all_values_read(capsys):
    code, report = inspect_json(capsys, "tiny", "--check")
    assert code == 0 and report["files"]["values_read"] and report["files"]["names"] == "vendor"
    assert main(["inspect", "tiny", "--check"]) == 0
    assert capsys.readouterr().out.startswith("tiny: no problems, all values finite")


def test_missing_extra_misshapen_and_wrong_dtype_are_named(checkpoint, capsys):
    norm, head = f"{BODY}norm.weight", "language_model.lm_head.weight"
    q_proj = f"{BODY}layers.0.self_attn.q_proj.weight"

    def change(tensors):
        del tensors[norm]
        tensors["language_model.surplus"] = np.zeros(3, np.float32)
        tensors[head] = tensors[head][:-1].copy()
        tensors[q_proj] = tensors[q_proj].astype(np.int8)

    rewrite(checkpoint, change)
    code, report = inspect_json(capsys, str(checkpoint))
    assert code == 1 and not report["ok"]
    problems = report["problems"]
    kinds = {"missing": norm, "unexpected": "language_model.surplus", "wrong shape": head, "wrong dtype": q_proj}
    assert set(problems) == set(kinds)
    for kind, name in kinds.items():
        assert [line.split(":")[0] for line in problems[kind]] == [name]
    assert main(["inspect", str(checkpoint)]) == 1
    text = capsys.readouterr().out
    assert "4 problems, listed below" in text and "\nMissing (1)\n" in text
    assert all(name in text for name in kinds.values())


def test_values_that_are_not_finite_are_named_only_when_read(checkpoint, capsys):
    name = f"{BODY}layers.3.input_layernorm.weight"

    def change(tensors):
        tensors[name][:3] = np.array([np.nan, np.inf, -np.inf], ml_dtypes.bfloat16)

    rewrite(checkpoint, change)
    assert inspect_json(capsys, str(checkpoint))[0] == 0
    code, report = inspect_json(capsys, str(checkpoint), "--check")
    assert code == 1
    assert report["problems"] == {"not finite": [f"{name}: 1 NaN and 2 infinite of 192 values"]}
    assert main(["inspect", "--check", str(checkpoint)]) == 1
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("keep", [5, 40_000, 1_000_000])
def test_truncated_file(checkpoint, capsys, keep):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    code, report = inspect_json(capsys, str(checkpoint))
    assert code == 1 and report["problems"]["files"][0].startswith("model.safetensors: ")
    assert report["parameters"]["total"] == 5_766_912  # the configuration is still told


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "not valid JSON"), ('{"model_type": "llama"}', "'llama'"), (None, "no such file")],
)
def test_broken_config_is_reported_beside_the_files(checkpoint, capsys, content, says):
    path = checkpoint / "config.json"
    path.unlink() if content is None else path.write_text(content)
    code, report = inspect_json(capsys, str(checkpoint))
    assert code == 1 and any(says in line for line in report["problems"]["files"])
    assert "config" not in report and report["files"]["tensors"] == 285
    assert main(["inspect", str(checkpoint)]) == 1
    assert says in capsys.readouterr().out


def test_empty_directory(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "no weights" in text and "config.json: no such file" in text and "nothing that can be read" in text


def test_long_lists_are_cut_in_the_text_only(checkpoint, capsys):
    rewrite(checkpoint, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts.1." in name])
    code, report = inspect_json(capsys, str(checkpoint))
    missing = report["problems"]["missing"]
    assert code == 1 and len(missing) == 12
    rewrite(checkpoint, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".experts." in name])
    count = len(inspect_json(capsys, str(checkpoint))[1]["problems"]["missing"])
    assert count == 4 * 16 * 3
    text = render_text(inspect_model(str(checkpoint)))
    assert text.count(": missing") == 20 and f"... and {count - 20} more (--json lists all)" in text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["/no/such/place"], "no such model directory"),
        (["m3", "--check"], "--check: needs a directory"),
        ([], "required: DIR"),
        (["tiny", "--chek"], "--chek"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, argv, says):
    assert main(["inspect", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("minimax-jax: error: ") and says in captured.err
    assert captured.err.count("\n") == 1


def test_tables_and_sizes():
    assert table([("a", "long"), ("bcd", "1")]) == ["a    long", "bcd     1"]
    assert [format_bytes(n) for n in (0, 999, 1000, 2_500_000, 854_080_000_000)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "2.50 MB",
        "854.08 GB",
    ]
