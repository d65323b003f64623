"""Each process reads what its devices need and no more; several processes generate one device's tokens."""

import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parallel_models import cases, name_of

from minimax_jax import MiniMaxM3Config, MiniMaxM3ForCausalLM
from minimax_jax.checkpoint import load_state
from minimax_jax.checkpoint.files import CheckpointFiles
from minimax_jax.checkpoint.load import plan_load
from minimax_jax.parallel import Layout, ParallelConfig, Ranks


def stored_bytes(sizes, ranks):
    """Bytes of the file that these ranks' parts are, each different part counted once."""
    config = MiniMaxM3Config.from_pretrained("tiny")
    layout, total = Layout(config, ParallelConfig(*sizes)), 0
    with plan_load("tiny", config) as plan:
        for name, tensor in plan.tensors.items():
            itemsize = 4 if tensor.float32 else 2  # as stored
            parts = {layout.ranges(tensor.shape, layout.splits(name), rank) for rank in ranks}
            total += itemsize * sum(math.prod(sum(b - a for a, b in axis) for axis in part) for part in parts)
    return total


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
    assert read == stored_bytes(sizes, range(ranks.layout.parallel.num_devices))
    for name, leaf in load_state("tiny", config, "float32").items():
        np.testing.assert_array_equal(ranks.whole(name, state[name]), leaf, err_msg=name)
    whole = sum(bytes_read) - read
    # K/V heads that several ranks have are read for each group of them; nothing else is read twice
    assert read == whole if sizes[0] <= 4 else whole <= read < 1.1 * whole


def run_processes(count, sizes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("generate_process.py")
    given = [str(number) for number in (port, count)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *given, str(number), *map(str, sizes)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


@pytest.mark.parametrize("sizes", cases([(8, 8, 1), (2, 8, 4)], [(2, 8, 4)]))
def test_two_processes_generate_one_devices_tokens(sizes):
    """Gloo between two processes of four devices each; data ranks lie in both."""
    prompts = [list(range(5, 45)), list(range(300, 310))]
    one = MiniMaxM3ForCausalLM.from_pretrained("tiny", "float32")
    expected = np.asarray(one.generate(prompts, max_new_tokens=3, do_sample=False)).tolist()
    for number, result in enumerate(run_processes(2, sizes)):
        assert result["tokens"] == expected
        assert result["read"] == stored_bytes(sizes, range(4 * number, 4 * number + 4))
