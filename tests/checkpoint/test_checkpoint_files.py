"""A directory's files as one set of tensors: single, sharded with an index, or just lying there."""

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_samples import write_checkpoint

from minimax_jax.checkpoint import CheckpointError, CheckpointFiles

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_index(directory: Path, content: object) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def sharded(directory: Path) -> None:
    write_checkpoint(directory, {"x": np.zeros(3), "y": np.ones(2)}, A)
    write_checkpoint(directory, {"z": np.full(4, 2.0)}, B)
    write_index(directory, {"metadata": {}, "weight_map": {"x": A, "y": A, "z": B}})


def problems(directory: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        CheckpointFiles.open(directory)
    return caught.value.problems


@pytest.mark.parametrize("kind", ["single", "index", "loose"])
def test_every_form_gives_the_same_tensors(tmp_path: Path, kind: str) -> None:
    if kind == "single":
        write_checkpoint(tmp_path, {"x": np.zeros(3), "y": np.ones(2), "z": np.full(4, 2.0)})
    else:
        sharded(tmp_path)
    if kind == "loose":
        (tmp_path / "model.safetensors.index.json").unlink()
    with CheckpointFiles.open(tmp_path) as files:
        assert sorted(files.names()) == ["x", "y", "z"] and "x" in files and "w" not in files
        assert files.dtype("z") == "F64" and files.shape("z") == (4,) and files.num_bytes("z") == 32
        np.testing.assert_array_equal(files.read("z", slice(1, 3)), [2.0, 2.0])
        with pytest.raises(CheckpointError, match="w: no such tensor"):
            files.read("w")


def test_the_single_file_goes_first_and_files_beside_the_index_are_left_alone(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_checkpoint(tmp_path, {"other": np.zeros(1)}, "draft.safetensors")
    with CheckpointFiles.open(tmp_path) as files:
        assert sorted(files.names()) == ["x", "y", "z"]
    write_checkpoint(tmp_path, {"only": np.zeros(1)})
    with CheckpointFiles.open(tmp_path) as files:
        assert files.names() == ("only",)


def test_no_weights_and_no_directory(tmp_path: Path) -> None:
    assert "no weights" in problems(tmp_path)[0]
    assert problems(tmp_path / "none") == ("no such directory",)


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_index(tmp_path, {"weight_map": {"x": A, "z": A, "gone": B, "far": "model-00009-of-00009.safetensors"}})
    (tmp_path / B).write_bytes((tmp_path / B).read_bytes()[:-1])
    found = "\n".join(problems(tmp_path))
    assert f"{B}: z: data ends" in found and "truncated" in found
    assert "model-00009-of-00009.safetensors: cannot be opened (No such file" in found
    assert f"z: not in {A}, where model.safetensors.index.json places it" in found
    assert f"y: in {A}, but model.safetensors.index.json does not name it" in found
    assert "gone" not in found  # its shard cannot be read, which is said once


def test_duplicates(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_checkpoint(tmp_path, {"x": np.zeros(3), "z": np.zeros(4)}, B)
    assert f"x: in both {A} and {B}" in problems(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert f"x: in both {A} and {B}" in problems(tmp_path)


@pytest.mark.parametrize(
    "content", ["{oops", "[]", '{"weight_map": []}', '{"weight_map": {}}', "{}", "[" * 100_000, '{"weight_map": 3}']
)
def test_an_unusable_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert problems(tmp_path)[0].startswith("model.safetensors.index.json: ")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", 3, None])
def test_an_index_cannot_reach_elsewhere(tmp_path: Path, shard: object) -> None:
    write_index(tmp_path, {"weight_map": {"x": shard}})
    assert f"x is in {shard!r}: must be a *.safetensors file of this directory" in problems(tmp_path)[0]


def test_the_listing_is_capped(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {f"t{i}": np.zeros(1) for i in range(30)}, A)
    write_index(tmp_path, {"weight_map": {"x": A}})
    with pytest.raises(CheckpointError) as caught:
        CheckpointFiles.open(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(caught.value.problems) == 31 and len(lines) == 22
    assert lines[0].endswith("31 problems") and lines[-1].strip() == "... and 11 more"
