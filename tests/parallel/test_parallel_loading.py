"""Each process reads what its devices need and no more; `test_processes.py` has several of them."""

import math
import tracemalloc

import numpy as np
import pytest
from parallel_models import four_head_config, name_of, stored_bytes

from minimax_jax import MiniMaxM3Config
from minimax_jax.checkpoint import load_state
from minimax_jax.checkpoint.files import CheckpointFiles
from minimax_jax.parallel import ParallelConfig, Ranks


@pytest.fixture
def bytes_read(monkeypatch):
    read, whole = [], CheckpointFiles.read

    def counted(self, name, index=None):
        view = whole(self, name, index)
        read.append(view.nbytes)
        return view

    monkeypatch.setattr(CheckpointFiles, "read", counted)
    return read


@pytest.mark.parametrize("sizes", [(4, 4, 1), (8, 8, 1), (8, 2, 1), (2, 8, 4)], ids=name_of)
def test_every_part_is_read_once_and_is_the_right_one(sizes, bytes_read):
    config = MiniMaxM3Config.from_pretrained("tiny")
    ranks = Ranks(config, ParallelConfig(*sizes))
    state = load_state("tiny", config, "float32", ranks=ranks)
    read = sum(bytes_read)
    assert read == stored_bytes("tiny", sizes, range(ranks.layout.parallel.num_devices))
    for name, leaf in load_state("tiny", config, "float32").items():
        np.testing.assert_array_equal(ranks.whole(name, state[name]), leaf, err_msg=name)
    whole = sum(bytes_read) - read
    # K/V heads that several ranks have are read for each group of them; nothing else is read twice
    assert read == whole if sizes[0] <= 4 else whole <= read < 1.1 * whole


def misaligned(shape):
    """An array that a CPU device has to copy, as others do: memory at multiples of 64 bytes is its own."""
    size = 4 * np.prod(shape)
    raw = np.zeros(size + 128, np.uint8)
    start = -raw.ctypes.data % 64 + 4
    return raw[start : start + size].view(np.float32).reshape(shape)


def test_the_host_holds_two_ranks_parts_at_most():
    """Of a tensor of 34 MB in eight parts; that reading takes no more memory shows test_checkpoint_load.py."""
    shape, ranks = (64, 1 << 17), Ranks(four_head_config(vocab_size=1 << 17), ParallelConfig(8, 8))
    tracemalloc.start()
    try:
        ranks.assemble("lm_head", shape, lambda ranges: misaligned([high - low for low, high in ranges]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    part = 4 * math.prod(shape) // 8
    assert part < peak < 2.2 * part


def test_weights_that_are_put_keep_no_memory_of_the_callers():
    ranks = Ranks(four_head_config(), ParallelConfig(2))
    raw = np.zeros(64 * 64 + 16, np.float32)
    start = -raw.ctypes.data % 64 // 4  # aligned as JAX's own
    whole = raw[start : start + 64 * 64].reshape(64, 64)
    held = ranks.put("norm.weight", whole[0]), ranks.put("layers.0.self_attn.index_k_proj", whole)
    whole[:] = 1
    assert not any(np.asarray(array).any() for array in held)
