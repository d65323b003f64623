"""`minimax-jax`: what it prints, its exit codes, and its errors; generation with small random weights."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tokenizer_samples import write_tokenizer

import minimax_jax
from minimax_jax import GenerationConfig, MiniMaxM3Config, MiniMaxM3ForCausalLM
from minimax_jax.checkpoint import STYLES, save_state, state_tensors
from minimax_jax.cli import build_parser, main
from minimax_jax.cli_generate import AnswerText, Run
from minimax_jax.tokenizer import TextStream, Tokenizer

END, START = 257, 258
STATISTICS = re.compile(
    r"(\d+) prompt tokens?, (\d+) new tokens?, [\d.]+ s to first token, (?:[\d.]+ tokens/s|no rate)\n"
)


def small_config() -> MiniMaxM3Config:
    return MiniMaxM3Config(
        vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        rotary_dim=8, dense_intermediate_size=32, intermediate_size=16, shared_intermediate_size=16,
        num_local_experts=4, num_experts_per_tok=2, index_n_heads=1, index_head_dim=16, index_topk_blocks=2,
        layer_types=("full_attention", "minimax_m3_sparse"), mlp_layer_types=("dense", "sparse"),
        max_position_embeddings=8192, bos_token_id=START, eos_token_id=END,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    config, random = small_config(), np.random.default_rng(0)
    tensors = state_tensors(config, STYLES["vendor"]).items()
    state = {name: random.standard_normal(tensor.shape, np.float32) * 0.3 for name, tensor in tensors}
    save_state(state, config, folder, style="vendor")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(checkpoint) -> Tokenizer:
    return Tokenizer.from_pretrained(checkpoint)


@pytest.fixture
def fake(monkeypatch, tokenizer):
    """A model that gives prepared tokens; `fake.called` and `fake.loaded` keep what it was asked."""
    made = SimpleNamespace(tokens=[], error=None, called=None, loaded=None, defaults={"eos_token_id": (END,)})

    class Model:
        config = small_config()

        def __init__(self):
            self.generation_config = GenerationConfig(**made.defaults)

        @classmethod
        def from_pretrained(cls, directory, dtype="auto", progress=True, quantization="auto"):
            made.loaded = (directory, dtype, quantization)
            return cls()

        def generate(self, input_ids, *, streamer, **options):
            made.called = {"ids": input_ids.tolist()[0], **options}
            streamer.put(input_ids)
            for token in made.tokens:
                streamer.put(np.array([token], np.int32))
            if made.error is not None:
                raise made.error
            streamer.end()

    monkeypatch.setattr(minimax_jax, "MiniMaxM3ForCausalLM", Model)
    return made


@pytest.fixture(scope="module")
def model(checkpoint) -> MiniMaxM3ForCausalLM:
    return MiniMaxM3ForCausalLM.from_pretrained(checkpoint)


@pytest.fixture
def loaded_once(model, monkeypatch):
    """Compiles once for several commands; loading has its own tests."""
    monkeypatch.setattr(
        MiniMaxM3ForCausalLM, "from_pretrained", staticmethod(lambda directory, dtype, quantization: model)
    )


def generate(checkpoint, *argv: str) -> int:
    return main(["generate", "--model", str(checkpoint), *argv])


def generate_json(capsys, checkpoint, *argv: str) -> dict:
    assert generate(checkpoint, "--json", *argv) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def assert_error(capsys, code: int, *parts: str) -> None:
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("minimax-jax: error: ") and captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


# Generation with the real engine


@pytest.mark.usefixtures("loaded_once")
def test_json_has_what_the_model_gives(capsys, checkpoint, tokenizer, model):
    result = generate_json(capsys, checkpoint, "--prompt", "héllo", "--max-new-tokens", "12", "--temperature", "0")
    ids = [START, *tokenizer.encode("héllo")]
    new = np.asarray(model.generate([ids], max_new_tokens=12, do_sample=False))[0, len(ids) :].tolist()
    assert result["prompt"] == "héllo" and result["prompt_token_ids"] == ids and result["token_ids"] == new
    assert result["text"] == tokenizer.decode(new)
    assert (result["prompt_tokens"], result["new_tokens"]) == (len(ids), len(new))
    assert result["finish_reason"] == ("stop" if new[-1] == END else "length")
    timings = result["timings"]
    assert 0 < timings["time_to_first_token_seconds"] < timings["total_seconds"] and timings["load_seconds"] > 0
    assert timings["tokens_per_second"] > 0


@pytest.mark.usefixtures("loaded_once")
def test_stream_prints_the_same_text_and_the_last_line(capsys, checkpoint):
    options = ("--prompt", "héllo", "--max-new-tokens", "12", "--ignore-eos", "--seed", "3", "--temperature", "1.5")
    text = generate_json(capsys, checkpoint, *options)["text"]
    assert generate(checkpoint, *options) == 0
    captured = capsys.readouterr()
    assert captured.out == text + "\n"
    found = STATISTICS.fullmatch(captured.err)
    assert found and found.groups() == ("7", "12")
    assert generate_json(capsys, checkpoint, *options[:-3], "4", *options[-2:])["text"] != text


def test_embedded_checkpoint_is_the_default(capsys):
    assert main(["generate", "--prompt", "In the beginning", "--max-new-tokens", "8", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.strip()) > 3 and captured.out.isprintable() is False  # ends with a line break
    assert STATISTICS.fullmatch(captured.err).group(2) == "8"


# What reaches the model


def test_prompt_without_chat_gets_the_document_start_once(capsys, checkpoint, tokenizer, fake):
    fake.tokens = tokenizer.encode("ok")
    assert generate_json(capsys, checkpoint, "--prompt", "a b")["prompt_token_ids"] == [START, *tokenizer.encode("a b")]
    generate_json(capsys, checkpoint, "--prompt", "]~!b[a b")
    assert fake.called["ids"] == [START, *tokenizer.encode("a b")]


def test_no_document_start_that_the_tokenizer_does_not_have(capsys, checkpoint, tokenizer, fake, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    for start in (263, None):  # 263 is a padded row of the embedding
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["bos_token_id"] = start
        (folder / "config.json").write_text(json.dumps(config))
        generate(folder, "--prompt", "a")
        assert fake.called["ids"] == tokenizer.encode("a")


def test_chat_applies_the_template(capsys, checkpoint, tokenizer, fake):
    result = generate_json(capsys, checkpoint, "--chat", "--prompt", "Hi", "--system", "Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert fake.called["ids"] == tokenizer.apply_chat_template(messages) and result["prompt"] == "Hi"
    generate_json(capsys, checkpoint, "--chat", "--prompt", "Hi", "--thinking-mode", "enabled")
    assert fake.called["ids"] == tokenizer.apply_chat_template(messages[1:], thinking_mode="enabled")


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ([], {}),
        (["--temperature", "0", "--top-k", "3"], {"do_sample": False}),
        (["--temperature", "0.5"], {"do_sample": True, "temperature": 0.5}),
        (["--top-p", "0.9"], {"do_sample": True, "top_p": 0.9}),
        (["--top-k", "0"], {"do_sample": True, "top_k": 0}),
        (["--execution", "segmented"], {"execution": "segmented"}),
        (["--cache-dtype", "fp8"], {"cache_dtype": "fp8"}),
        (["--seed", "9", "--ignore-eos", "--max-new-tokens", "5"],
         {"seed": 9, "eos_token_id": -1, "max_new_tokens": 5}),
    ],
)  # fmt: skip
def test_options_reach_the_model(checkpoint, fake, argv, options):
    assert generate(checkpoint, "--prompt", "a", *argv, "--dtype", "bfloat16", "--quantization", "none") == 0
    given = {key: value for key, value in fake.called.items() if value is not None and key != "ids"}
    assert given == {"seed": 0, "execution": "auto", "cache_dtype": "auto", **options}
    assert fake.loaded == (str(checkpoint), "bfloat16", "none")


# Where prompts come from


def test_prompt_file_and_standard_input_lose_one_line_break(checkpoint, fake, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    for content, prompt in (("é\n", "é"), ("a\n\n", "a\n"), ("a\r\n", "a"), ("a", "a"), ("a\nb", "a\nb")):
        path.write_bytes(content.encode())
        assert generate(checkpoint, "--prompt-file", str(path)) == 0
        assert fake.called["ids"][1:] == tokenizer.encode(prompt)
        monkeypatch.setattr(sys, "stdin", io.StringIO(content))
        assert generate(checkpoint) == 0
        assert fake.called["ids"][1:] == tokenizer.encode(prompt)


def test_terminal_as_standard_input_is_not_waited_for(capsys, checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert_error(capsys, generate(checkpoint), "no prompt: give --prompt")


def test_bad_prompts(capsys, checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "prompt.bin"
    path.write_bytes(b"ab\xff")
    assert_error(capsys, generate(checkpoint, "--prompt-file", str(path)), f"--prompt-file {path}", "UTF-8", "byte 2")
    assert_error(capsys, generate(checkpoint, "--prompt-file", "/no/such"), "--prompt-file /no/such: No such file")
    assert_error(capsys, generate(checkpoint, "--prompt-file", str(tmp_path)), "Is a directory")
    assert_error(capsys, generate(checkpoint, "--prompt", ""), "--prompt: the prompt is empty")
    assert_error(capsys, generate(checkpoint, "--chat", "--prompt", ""), "--prompt: the prompt is empty")
    assert_error(capsys, generate(checkpoint, "--prompt", "a\udc80"), "--prompt: text: lone surrogate")
    assert_error(capsys, generate(checkpoint, "--prompt", "a" * 9000), "9001 tokens", "max_position_embeddings = 8192")
    code = generate(checkpoint, "--prompt", "a" * 8000, "--max-new-tokens", "500")
    assert_error(capsys, code, "--max-new-tokens = 500: must be at most 191")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert_error(capsys, generate(checkpoint), "standard input: the prompt is empty")


# What is printed


def text_of(fake, capsys, checkpoint, *argv: str) -> str:
    assert generate(checkpoint, "--prompt", "a", *argv) == 0
    return capsys.readouterr().out


def test_characters_are_printed_whole_and_end_of_text_is_not(capsys, checkpoint, tokenizer, fake):
    fake.tokens = [*tokenizer.encode("né 🙂!"), END]
    assert text_of(fake, capsys, checkpoint) == "né 🙂!\n"
    fake.tokens = tokenizer.encode("🙂")[:2]
    assert text_of(fake, capsys, checkpoint) == "\ufffd\n"
    fake.tokens = []
    assert text_of(fake, capsys, checkpoint) == "\n"


def test_finish_reasons(capsys, checkpoint, tokenizer, fake):
    fake.tokens = [*tokenizer.encode("x"), END]
    result = generate_json(capsys, checkpoint, "--prompt", "a")
    assert result["finish_reason"] == "stop" and result["token_ids"][-1] == END and result["text"] == "x"
    assert generate_json(capsys, checkpoint, "--prompt", "a", "--ignore-eos")["finish_reason"] == "length"
    fake.tokens = tokenizer.encode("x")
    result = generate_json(capsys, checkpoint, "--prompt", "a")
    assert result["finish_reason"] == "length" and result["timings"]["tokens_per_second"] is None


@pytest.mark.parametrize(
    ("mode", "generated", "shown", "reasoning", "content"),
    [
        ("adaptive", "</mm:think>Hi", "Hi", "", "Hi"),
        ("adaptive", "<mm:think>hm</mm:think>Hi", "<mm:think>hm</mm:think>Hi", "hm", "Hi"),
        ("adaptive", "Hi", "Hi", "", "Hi"),
        ("enabled", "hm</mm:think>Hi", "<mm:think>hm</mm:think>Hi", "hm", "Hi"),
        ("enabled", "hm", "<mm:think>hm", "hm", ""),
        ("enabled", "</mm:think>Hi", "Hi", "", "Hi"),
        ("disabled", "Hi</mm:think>", "Hi</mm:think>", "", "Hi</mm:think>"),
    ],
)
def test_thinking(capsys, checkpoint, tokenizer, fake, mode, generated, shown, reasoning, content):
    fake.tokens = tokenizer.encode(generated)
    assert text_of(fake, capsys, checkpoint, "--chat", "--thinking-mode", mode) == shown + "\n"
    result = generate_json(capsys, checkpoint, "--prompt", "a", "--chat", "--thinking-mode", mode)
    assert (result["text"], result["reasoning"], result["content"]) == (generated, reasoning, content)


def test_markers_written_in_ordinary_tokens(tokenizer):
    answer = AnswerText(TextStream(tokenizer), None)
    backend = [tokenizer.token_to_id(char) for char in "<mm:think>hm</mm:think>Hi"]
    assert "".join(map(answer.push, backend)) + answer.finish() == "<mm:think>hm</mm:think>Hi"


def test_statistics_of_a_short_run():
    run = Run(1, None)
    run.put(np.zeros((1, 1), np.int32))
    assert run.statistics() == "1 prompt token, 0 new tokens, no first token, no rate"
    run.put(np.array([7]))
    assert re.fullmatch(r"1 prompt token, 1 new token, \d+\.\d\d s to first token, no rate", run.statistics())


# Errors and interruptions


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["generat"], "invalid choice: 'generat'"),
        (["generate", "--prompt", "a", "--no-such"], "unrecognized arguments: --no-such"),
        (["generate", "--prompt", "a", "--temp", "1"], "--temp"),
        (["generate", "--prompt", "a", "--prompt-file", "b"], "not allowed with argument --prompt"),
        (["generate", "--max-new-tokens", "0"], "--max-new-tokens: must be an integer >= 1, got '0'"),
        (["generate", "--temperature", "-1"], "--temperature: must be a number >= 0 (0 is greedy), got '-1'"),
        (["generate", "--temperature", "nan"], "--temperature"),
        (["generate", "--top-p", "0"], "--top-p: must be a number in (0, 1], got '0'"),
        (["generate", "--top-k", "x"], "--top-k: must be an integer >= 0, got 'x'"),
        (["generate", "--seed", "-1"], "--seed: must be an integer within 0..4294967295"),
        (["generate", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["generate", "--prompt", "a", "--system", "b"], "--system: only allowed with --chat"),
        (["generate", "--prompt", "a", "--thinking-mode", "enabled"], "--thinking-mode: only allowed with --chat"),
        (["generate", "--prompt", "a", "--model", "/no/such"], "/no/such: no such model directory"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, argv, says):
    assert_error(capsys, main(argv), says)


def test_broken_checkpoints(capsys, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_error(capsys, generate(folder, "--prompt", "a"), "model.safetensors", "truncated")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 48, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(checkpoint / "model.safetensors", weights)
    assert_error(capsys, generate(folder, "--prompt", "a"), "problems: ", "`minimax-jax inspect` lists all")
    config["text_config"] |= {"num_key_value_heads": 3, "rms_norm_eps": -1}
    (folder / "config.json").write_text(json.dumps(config))
    assert_error(capsys, generate(folder, "--prompt", "a"), "config.json: impossible configuration: ", "rms_norm_eps")
    (folder / "tokenizer.json").unlink()
    shutil.copy(checkpoint / "config.json", folder)
    assert_error(capsys, generate(folder, "--prompt", "a"), "no tokenizer.json")
    write_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    assert_error(capsys, generate(folder, "--prompt", "a", "--chat"), "chat_template")


def test_full_device_is_an_error_without_traceback(capsys, checkpoint, fake):
    fake.error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")
    assert generate(checkpoint, "--prompt", "a") == 2
    error = "minimax-jax: error: not enough device memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n"
    assert capsys.readouterr().err == error
    fake.error = jax.errors.JaxRuntimeError("INTERNAL: a bug")
    with pytest.raises(jax.errors.JaxRuntimeError):  # bugs keep their traceback
        generate(checkpoint, "--prompt", "a")


def test_interrupted_generation_ends_the_line_and_gives_statistics(capsys, checkpoint, tokenizer, fake):
    fake.tokens, fake.error = tokenizer.encode("abc"), KeyboardInterrupt()
    assert generate(checkpoint, "--prompt", "a") == 130
    captured = capsys.readouterr()
    assert captured.out == "abc\n" and STATISTICS.fullmatch(captured.err).groups() == ("2", "3")
    assert generate(checkpoint, "--prompt", "a", "--json") == 130
    result = json.loads(capsys.readouterr().out)
    assert result["finish_reason"] == "interrupted" and result["text"] == "abc"


def test_interrupted_elsewhere(capsys, checkpoint, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("minimax_jax.cli_generate.Tokenizer.from_pretrained", interrupt)
    assert generate(checkpoint, "--prompt", "a") == 130
    assert capsys.readouterr().err == "\nminimax-jax: interrupted\n"


# Help and version


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"minimax-jax {minimax_jax.__version__}\n"


def test_every_option_has_a_help_text_with_its_default():
    commands = build_parser()._subparsers._group_actions[0].choices
    assert set(commands) == {"generate", "bench", "inspect", "quantize"}
    benchmarks = commands["bench"]._subparsers._group_actions[0].choices
    assert set(benchmarks) == {"rank-slice"}
    for parser in (*commands.values(), *benchmarks.values()):
        for action in parser._actions:
            if action.dest not in ("help", "directory", "out_directory", "benchmark"):
                assert "(default: " in action.help, action.dest


@pytest.mark.parametrize("argv", [[], ["generate"], ["bench"], ["bench", "rank-slice"], ["inspect"], ["quantize"]])
def test_help(capsys, argv):
    assert main([*argv, "--help"]) == 0
    text = capsys.readouterr().out
    assert "exit codes:" in text and "130" in text
    if argv == ["generate"]:
        assert "document-" in text


# As a process


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "minimax_jax", *argv]


def test_help_does_not_wait_for_jax():
    script = (
        "import sys; from minimax_jax.cli import main; "
        "main(['generate', '--help']); main(['generate', '--seed', 'x']); main(['--version']); "
        "sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'numpy', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60).returncode == 0


def test_closed_pipe_ends_quietly(checkpoint):
    argv = command("inspect", "m3", "--json")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 0)
    # the reader is gone before the first token comes
    argv = command("generate", "--model", str(checkpoint), "--prompt", "a", "--ignore-eos", "--max-new-tokens", "20")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(120)) == (b"", 0)


def test_ctrl_c_during_generation(checkpoint):
    argv = command("generate", "--model", str(checkpoint), "--prompt", "a", "--ignore-eos", "--max-new-tokens", "8000")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and first and out.endswith(b"\n")
    lines = err.decode().splitlines()
    assert len(lines) == 1 and STATISTICS.fullmatch(lines[0] + "\n")
    assert int(STATISTICS.fullmatch(lines[0] + "\n").group(2)) < 8000
