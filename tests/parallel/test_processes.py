"""Several processes give one process's tokens, read their part of the checkpoint, and end together."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from parallel_models import one_device, prompts, stored_bytes
from selected_blocks import recorded_blocks
from tokenizer_samples import write_tokenizer

from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.parallel import Layout, ParallelConfig, ProcessesConfig

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = [sys.executable, str(ROOT / "scripts" / "launch.py")]
PROGRAM = Path(__file__).with_name("processes_program.py")
NEW = 4
# compiled as conftest.py says, but without its eight devices
FLAGS = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
ENVIRONMENT = {**os.environ, "XLA_FLAGS": " ".join(FLAGS)}
LLM_SHAPES = {
    "max_batch_size": 2,
    "max_num_tokens": 32,
    "segment_config": {"buckets": (32,)},
    "decode_config": {"batch_sizes": (2,), "page_buckets": (4,)},
    "cache_config": {"page_size": 16, "max_tokens": 12 * 16},
    "max_seq_len": 64,
}


@pytest.fixture(scope="module")
def model() -> MiniMaxM3ForCausalLM:
    return one_device(vocab_size=264, max_position_embeddings=8192, bos_token_id=258, eos_token_id=257)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "model"
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def one(model, tmp_path_factory) -> tuple[list[list[int]], np.ndarray, Path]:
    """(prompts, one device's greedy tokens, a file with its logits and selected blocks)."""
    ids, file = prompts(20, 9, 60, vocab=250), tmp_path_factory.mktemp("expected") / "expected.npz"
    with recorded_blocks() as found:
        logits, blocks = found.during(lambda: model(ids).logits)
    np.savez(file, logits=logits, blocks=blocks[0])
    return ids, np.asarray(model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=-1)), file


def run_together(count: int, folder: Path, **plan) -> list[dict]:
    """Runs the program in `count` processes and returns what each has written."""
    plan = json.dumps({"new": NEW, "out": str(folder), **plan})
    command = [*LAUNCH, "--processes", str(count), "--", sys.executable, str(PROGRAM), plan]
    command += ["--cpu-devices", str(4 // count)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(count)]


def in_whole_and_parts(directory: Path, config, sizes) -> tuple[int, int]:
    """Stored bytes of tensors that every rank has, and of those that ranks share out."""
    layout = Layout(config, ParallelConfig(*sizes))
    everything = stored_bytes(directory, (1, 1, 1), [0], itemsize=4)
    each = [stored_bytes(directory, sizes, [rank], itemsize=4) for rank in range(layout.parallel.num_devices)]
    # whole + split / n each
    split = (everything - each[0]) * len(each) // (len(each) - 1)
    return everything - split, split


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "layouts", "llm"),
    [
        pytest.param(2, [(4, 4, 1)], (2, 4, 2), id="2"),
        pytest.param(4, [(1, 4, 4)], None, id="4", marks=pytest.mark.long),
        pytest.param(2, [(1, 4, 1), (2, 2, 2), (1, 4, 4)], (4, 4, 1), id="2-others", marks=pytest.mark.long),
        pytest.param(4, [(4, 4, 1), (2, 4, 2), (4, 2, 1)], (1, 4, 4), id="4-others", marks=pytest.mark.long),
    ],
)
def test_processes_give_one_devices_numbers_and_read_their_part(count, layouts, llm, one, model, checkpoint, tmp_path):
    """Four devices in all; TP with EP, attention data parallelism, both; logits, blocks, `generate` and `LLM`."""
    ids, expected, file = one
    plan = {"model": str(checkpoint), "layouts": layouts, "prompts": ids, "llm": llm, "shapes": LLM_SHAPES}
    results, lengths = run_together(count, tmp_path, expected=str(file), **plan), [len(prompt) for prompt in ids]
    for place, sizes in enumerate(layouts):  # every head of every token in one process or another, some in several
        layout = Layout(model.config, ParallelConfig(*sizes))
        copies = layout.local_config.num_key_value_heads * sizes[0] * max(1, sizes[1] // (sizes[0] * sizes[2]))
        assert sum(result["compared"][place][1] for result in results) == sum(lengths) * copies
    for number, result in enumerate(results):
        assert result["index"] == number
        own = range(4 // count * number, 4 // count * (number + 1))
        found = zip(layouts, result["tokens"], result["read"], result["compared"], strict=True)
        for sizes, tokens, read, (off, _, other) in found:
            assert off <= 1e-4 and other == 0, sizes
            np.testing.assert_array_equal(tokens, expected, err_msg=str(sizes))
            assert read == stored_bytes(checkpoint, sizes, own, itemsize=4), sizes
        whole, split = in_whole_and_parts(checkpoint, model.config, (4, 4, 1))
        if layouts[0] == (4, 4, 1):
            assert result["read"][0] == whole + split // count and whole < split
        if llm is not None:
            assert result["llm"] == [expected[:, -NEW:].tolist()] * 2


FIRST_PORT = 2**16 - 2**12  # where JAX's ports of clusters' jobs begin; a job's number says which


def free_job() -> int:
    """The number of a job whose port is free here."""
    for job in random.sample(range(2**12), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", FIRST_PORT + job))
            return job
    raise OSError("no port is free")


def variables(cluster: str, job: int, number: int) -> dict[str, str]:
    """What srun, or Open MPI's mpirun, tells process `number` of two on one host."""
    if cluster == "slurm":
        count, rank = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}, "SLURM_"
        return {**count, f"{rank}PROCID": str(number), f"{rank}LOCALID": str(number), "SLURM_STEP_NUM_NODES": "1"}
    count, rank = {"OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:34911"}, "OMPI_COMM_WORLD_"
    return {**count, f"{rank}SIZE": "2", f"{rank}RANK": str(number), f"{rank}LOCAL_RANK": str(number)}


def start_pair(checkpoint: Path, *options: str, cluster: str | None = None) -> list[subprocess.Popen]:
    """Two processes of `generate`: of a cluster's job, or with a coordinator."""
    job, started = free_job(), []
    command = [sys.executable, "-m", "minimax_jax", "generate", "--model", str(checkpoint), "--cpu-devices", "1"]
    for number in range(2):
        where = ["--coordinator", f"127.0.0.1:{FIRST_PORT + job}", "--num-processes", "2", "--process-id", str(number)]
        environment = ENVIRONMENT
        if cluster is not None:
            where, environment = ["--distributed", cluster], {**ENVIRONMENT, **variables(cluster, job, number)}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([*command, *options, *where], env=environment, **pipes))
    return started


@pytest.mark.slow
def test_a_dead_process_ends_the_other_in_mid_generation(checkpoint):
    long = ("--tp", "2", "--prompt", "abc", "--max-new-tokens", "8000", "--ignore-eos", "--temperature", "0")
    first, second = start_pair(checkpoint, *long, "--peer-timeout", "20")
    try:
        assert first.stdout.read(1)  # tokens come
        second.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        _, errors = first.communicate(timeout=60)
        assert first.returncode == 3 and time.monotonic() - begun < 20
        assert "process 1 of 2 (on " in errors.decode() and "was lost: it has ended without a word" in errors.decode()
        assert "Traceback" not in errors.decode() and second.communicate()[0] == b""  # process 0 alone prints
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


FAILING = """
import jax
from minimax_jax.parallel import ProcessesConfig, start_processes
jax.config.update("jax_platforms", "cpu")
with start_processes(ProcessesConfig()) as processes:
    if processes.index == 1:
        raise MemoryError("no room for it")
    processes.from_first(lambda: 1)
    import time
    time.sleep(60)
"""


def test_an_error_in_one_process_of_a_program_ends_all_with_its_message():
    """In a SLURM job, which JAX finds by itself."""
    job, pair = free_job(), []
    for number in range(2):
        environment = {**ENVIRONMENT, **variables("slurm", job, number)}
        command = [sys.executable, "-c", FAILING]
        pair.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT))
    said = [process.communicate(timeout=60)[1] for process in pair]
    assert [process.returncode for process in pair] == [1, 1]
    assert all("MemoryError: no room for it" in text for text in said)


def test_sizes_that_the_processes_do_not_have_are_refused_once_and_before_loading(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())  # and nothing to load
    pair = start_pair(tmp_path, "--tp", "4", "--prompt", "a", cluster="ompi")
    results = [(process.communicate(timeout=120), process.returncode) for process in pair]
    assert [code for _, code in results] == [2, 2]
    errors = [line for (_, text), _ in results for line in text.decode().splitlines() if line.startswith("minimax-jax")]
    assert len(errors) == 1  # of whichever process found it first
    refusal = (
        "tensor = 4, expert = 1, attention_data = 1: take 4 devices, must be the 2 of all 2 processes (this one has 1) "
        "(tensor is --tp, expert is --ep, attention_data is --attention-dp)"
    )
    assert re.fullmatch(rf"minimax-jax: error: (process 1 of 2 \(on .+\): )?{re.escape(refusal)}", errors[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "here"}, "coordinator = 'here': must be HOST:PORT"),
        ({"coordinator": "a:1", "num_processes": 2}, "process_id: must be given with coordinator"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "process_id = 2: must be within 0..1"),
        ({"process_id": 2}, "process_id = 2: only allowed with coordinator"),
        ({"peer_timeout": 0}, "peer_timeout = 0: must be at least 1"),
    ],
)
def test_what_does_not_say_where_the_processes_are(options, message):
    with pytest.raises(ValueError, match=message):
        ProcessesConfig(**options)
