"""`minimax-jax bench` and scripts/generate.py: what they write and say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minimax_jax import MiniMaxM3Config, MiniMaxM3ForCausalLM
from minimax_jax.cli import main
from minimax_jax.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    config = MiniMaxM3Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        rotary_dim=8, dense_intermediate_size=32, intermediate_size=16, shared_intermediate_size=16,
        num_local_experts=4, num_experts_per_tok=2, index_n_heads=1, index_head_dim=16, index_topk_blocks=2,
        layer_types=("full_attention", "minimax_m3_sparse"), mlp_layer_types=("dense", "sparse"),
        max_position_embeddings=512,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("small") / "model"
    MiniMaxM3ForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_bench_writes_its_results(checkpoint, tmp_path, capsys):
    arguments = ["--batch-sizes", "1,2", "--input-lens", "9", "--output-len", "4", "--num-prompts", "3"]
    limits = ["--repeats", "2", "--max-batch-size", "2", "--max-num-tokens", "16"]
    assert main(["bench", "--model", str(checkpoint), *arguments, *limits, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [(p["batch"], p["input_len"], p["output_len"]) for p in report["latency"]] == [(1, 9, 4), (2, 9, 4)]
    for point in report["latency"]:
        assert point["new_tokens_per_second"] == pytest.approx(point["batch"] * 4 / point["seconds"])
        assert 0 < point["first_token_ms"] <= point["seconds"] * 1e3 * 2 and point["token_ms"] > 0
    throughput = report["throughput"]
    assert (throughput["prompts"], throughput["prompt_tokens"], throughput["new_tokens"]) == (3, 27, 12)
    assert report["stats"]["reuse_asked"] == 0 and "3 prompts at once" in printed and "bench.json" in printed
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        assert "matplotlib is not installed" in printed
    else:
        assert (tmp_path / "out" / "bench.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-sizes", "1,x"], "--batch-sizes: must be an integer >= 1, got 'x'"),
        (["--output-len", "1"], "--output-len: must be an integer >= 2, got '1'"),
        (["--steps-per-launch", "0"], "--steps-per-launch: must be an integer within 1..256, got '0'"),
        (["--prompt-file", "/nowhere"], "--prompt-file /nowhere: No such file or directory"),
        (["--prompt-file", "/"], "--prompt-file /: Is a directory"),
        (["--tp", "3"], "tensor = 3: must be one of 1, 2, 4, 8 (tensor is --tp, "),
    ],
)
def test_bad_bench_arguments_are_named(arguments, message, tmp_path, capsys):
    assert main(["bench", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must have at least one line that is not empty"),
        (b"\n \r\n\t", "must have at least one line that is not empty"),
        (b"text\nmore\n\xff\xfe\n", "must be UTF-8 text, and is not at byte 10, in line 3"),
    ],
)
def test_prompt_files_that_hold_no_prompts_are_named_before_anything_loads(content, message, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes(content)
    assert main(["bench", "--model", "/nowhere", "--prompt-file", str(tmp_path / "prompts.txt")]) == 2
    assert f"--prompt-file {tmp_path / 'prompts.txt'}: {message}" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_takes_prompts_from_a_file(tmp_path, capsys):
    """One a line, whatever else ends lines elsewhere; as many as are asked for, each with room for its answer."""
    path, texts = tmp_path / "prompts.txt", ["In the beginning", "And the\u2028earth \x0c was"]
    path.write_text("\n".join([texts[0], "", texts[1] + "\r", "light " * 9000]), encoding="utf-8")
    arguments = ["--prompt-file", str(path), "--batch-sizes", "1", "--input-lens", "9", "--output-len", "4"]
    limits = ["--repeats", "1", "--max-batch-size", "2", "--max-num-tokens", "16", "--out", str(tmp_path / "out")]
    assert main(["bench", *arguments, *limits, "--num-prompts", "2"]) == 0
    throughput = json.loads((tmp_path / "out" / "bench.json").read_text())["throughput"]
    tokenizer = Tokenizer.from_pretrained("tiny")
    given = sum(1 + len(tokenizer.encode(text)) for text in texts)  # each begins with the document-start token
    assert (throughput["prompts"], throughput["prompt_tokens"], throughput["new_tokens"]) == (2, given, 8)
    capsys.readouterr()
    assert main(["bench", *arguments, *limits]) == 2
    printed = capsys.readouterr()
    assert f"--prompt-file {path}: line 4 has " in printed.err and "room for --output-len 4" in printed.err
    assert "latency" not in printed.out + printed.err


def test_the_script_says_what_is_wrong_and_how_to_use_it():
    script = ROOT / "scripts" / "generate.py"
    helped = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "--prompt-file" in helped.stdout
    wrong = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no prompt: give --prompt or --prompt-file" in wrong.stderr
    wrong = subprocess.run([sys.executable, script, "--prompt-file", "/nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--prompt-file /nowhere: No such file or directory" in wrong.stderr
