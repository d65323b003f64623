"""The safetensors reader: every dtype, slices without reading the rest, and every way a file can be wrong."""

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from minimax_jax.checkpoint import CheckpointError, SafetensorsFile
from minimax_jax.checkpoint.safetensors_reader import DTYPES


def write(path: Path, header: object, data: bytes = b"") -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_every_dtype_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    numpy_dtype = DTYPES[dtype]
    raw = np.random.default_rng(0).integers(0, 256, 6 * numpy_dtype.itemsize).astype(np.uint8)
    if dtype == "BOOL":
        raw &= 1
    size = 6 * numpy_dtype.itemsize
    path = write(tmp_path / "a.safetensors", {"x": entry(dtype, [2, 3], [0, size])}, raw.tobytes())
    with SafetensorsFile(path) as file:
        array = file.read("x")
        assert (file.names(), file.shape("x"), file.dtype("x")) == (("x",), (2, 3), dtype)
        assert array.dtype == numpy_dtype and array.shape == (2, 3) and not array.flags.writeable
        assert array.tobytes() == raw.tobytes()


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "bf16": np.arange(12, dtype=np.float32).astype(ml_dtypes.bfloat16).reshape(3, 4),
        "e4m3": np.arange(7, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),  # odd size: what follows is unaligned
        "f32": np.arange(5, dtype=np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(3, np.float32),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert set(file.names()) == set(tensors)
        for name, value in tensors.items():
            assert file.shape(name) == value.shape and file.read(name).tobytes() == value.tobytes()


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_slices_equal_slices_of_the_whole(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = np.arange(5 * 6 * 7, dtype=np.int32).reshape(5, 6, 7)
    path = tmp_path_factory.mktemp("s") / "a.safetensors"
    save_file({"x": whole}, path)
    bounds = [st.integers(-8, 8) | st.none()] * 2
    index = tuple(slice(*data.draw(st.tuples(*bounds))) for _ in range(data.draw(st.integers(0, 3))))
    with SafetensorsFile(path) as file:
        np.testing.assert_array_equal(file.read("x", index), whole[index])


def test_a_slice_does_not_read_the_rest(tmp_path: Path) -> None:
    rows, columns = 1 << 20, 1 << 16  # 128 GiB of nothing: more than this machine could hold
    size = rows * columns * 2
    path = write(tmp_path / "a.safetensors", {"x": entry("BF16", [rows, columns], [0, size])})
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + size)
    with SafetensorsFile(path) as opened:
        part = np.array(opened.read("x", (slice(rows - 3, rows), slice(5, 9))))
        opened.release("x")
    assert part.shape == (3, 4) and not part.any()


def test_views_outlive_the_file_and_release_loses_nothing(tmp_path: Path) -> None:
    value = np.arange(100_000, dtype=np.float32)
    save_file({"x": value}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        view = file.read("x")
        file.release("x")
    np.testing.assert_array_equal(view, value)
    with pytest.raises(CheckpointError, match="already closed"):
        file.read("x")


BAD_HEADERS = {
    "not JSON": (b"{oops", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "deep": (b"[" * 100_000, b"", "not valid JSON"),
    "a list": ([], b"", "must be an object"),
    "duplicate": (b'{"x": {}, "x": {}}', b"", "x: stands twice"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "entry": ({"x": 3}, b"", "x: header entry is 3"),
    "dtype": ({"x": entry("F31")}, bytes(8), "x: dtype 'F31': must be one of"),
    "no dtype": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "x: dtype None"),
    "negative shape": ({"x": entry(shape=[-2])}, bytes(8), r"x: shape \[-2\]"),
    "float shape": ({"x": entry(shape=[2.0])}, bytes(8), r"x: shape \[2.0\]"),
    "bool shape": ({"x": entry("U8", [True], [0, 1])}, bytes(1), r"x: shape \[True\]"),
    "vast shape": ({"x": entry(shape=[0, 1 << 40, 1 << 40], offsets=[0, 0])}, b"", "x: shape"),
    "offsets": ({"x": entry(offsets=[0])}, bytes(8), r"x: data_offsets \[0\]"),
    "reversed offsets": ({"x": entry(offsets=[8, 0])}, bytes(8), "hold -8 bytes"),
    "size": ({"x": entry(shape=[3])}, bytes(8), r"x: data_offsets \[0, 8\] hold 8 bytes, F32 \[3\] needs 12"),
    "hole": ({"x": entry(), "y": entry(offsets=[12, 20])}, bytes(20), "y: data starts at 12: must be 8"),
    "overlap": ({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12), "y: data starts at 4: must be 8"),
    "late start": ({"x": entry(offsets=[4, 12])}, bytes(12), "x: data starts at 4: must be 0"),
    "truncated": ({"x": entry(), "y": entry(offsets=[8, 16])}, bytes(15), "y: data ends at byte .*truncated"),
    "trailing": ({"x": entry()}, bytes(11), "3 bytes after the last tensor"),
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_a_malformed_file_names_itself_and_the_tensor(tmp_path: Path, kind: str) -> None:
    header, data, message = BAD_HEADERS[kind]
    path = write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"1234567", "too short"),
        (struct.pack("<Q", 1 << 60) + b"{}", "header length .* not a safetensors file"),
        (struct.pack("<Q", 1000) + b"{}", "only 2 bytes after it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(tmp_path / "bad.safetensors")


def test_absent_files_and_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: cannot be opened \(No such file"):
        SafetensorsFile(tmp_path / "none.safetensors")
    save_file({"x": np.zeros(1)}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file, pytest.raises(CheckpointError, match="y: no such tensor"):
        file.read("y")


SOUND = save({"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(5, np.uint8)}, {"format": "pt"})


def check_open(path: Path, content: bytes) -> None:
    """Either a clear error or a file all of whose tensors can be read."""
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except CheckpointError as error:
        if not str(error).startswith(f"{path}: "):
            raise
        return
    for name in file.names():
        assert file.read(name).tobytes() == bytes(content)[file.entry(name).start :][: file.entry(name).num_bytes]


@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_never_crash(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(SOUND)
    for position, value in changes:
        content[position] = value
    check_open(tmp_path / "flipped.safetensors", bytes(content))


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    for length in range(len(SOUND)):
        (tmp_path / "cut.safetensors").write_bytes(SOUND[:length])
        with pytest.raises(CheckpointError):
            SafetensorsFile(tmp_path / "cut.safetensors")


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_headers_never_crash(tmp_path: Path, header: bytes) -> None:
    check_open(tmp_path / "random.safetensors", struct.pack("<Q", len(header)) + header)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(JSON_VALUES, JSON_VALUES, JSON_VALUES, st.integers(0, 16))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_odd_json_never_crashes(tmp_path: Path, dtype: object, shape: object, offsets: object, size: int) -> None:
    for header in ({"x": entry(dtype)}, {"x": entry(shape=shape)}, {"x": entry(offsets=offsets)}, {"x": dtype}):
        content = json.dumps(header).encode()
        check_open(tmp_path / "odd.safetensors", struct.pack("<Q", len(content)) + content + bytes(size))
