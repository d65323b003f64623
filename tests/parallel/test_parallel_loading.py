"""Each process reads what its devices need and no more; `test_processes.py` has several of them."""

import numpy as np
import pytest
from parallel_models import name_of, stored_bytes

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
