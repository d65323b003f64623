"""Weights, dtypes and devices as torch's users handle them, and generate with transformers' arguments."""

import functools
import inspect
import re
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch_pairs import pair_config, torch_model, weights_of  # noqa: E402

import minimax_jax  # noqa: E402
import minimax_jax.torch as bridge  # noqa: E402
from minimax_jax import GenerationConfig  # noqa: E402
from minimax_jax.generation_arguments import generation_options  # noqa: E402
from minimax_jax.paths import model_directory  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "torch.md"

CONFIG = pair_config(layers=2, max_position_embeddings=256)
IDS = torch.randint(1, 96, (2, 20), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def theirs():
    return torch_model(CONFIG)


@pytest.fixture(scope="module")
def ours(theirs):
    return bridge.MiniMaxM3ForCausalLM(CONFIG, weights_of(theirs, CONFIG))


def fresh(ours, kind=bridge.MiniMaxM3ForCausalLM):
    """A model with other weights than ours."""
    return kind(ours.config, {name: jnp.asarray(np.asarray(array) * 0.5) for name, array in ours.state().items()})


def same_state(left, right):
    return all(np.array_equal(np.asarray(a), np.asarray(right.state()[name])) for name, a in left.state().items())


def test_state_dict_is_transformers(theirs, ours):
    expected, state = theirs.state_dict(), ours.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert {name for name, _ in ours.named_parameters()} == {name for name, _ in theirs.named_parameters()}
    assert {name for name, _ in ours.named_buffers()} == {n for n, _ in theirs.named_buffers() if n in state}
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    assert ours.num_parameters() == sum(tensor.numel() for tensor in (*ours.parameters(), *ours.buffers()))
    assert ours.get_memory_footprint() == sum(tensor.nbytes for tensor in state.values())
    weights_alone = sum(tensor.nbytes for tensor in ours.parameters())
    assert ours.get_memory_footprint(return_buffers=False) == weights_alone < ours.get_memory_footprint()
    assert bridge.MiniMaxM3ForCausalLM.can_generate() and ours.can_generate()
    assert theirs.load_state_dict(ours.state_dict()).missing_keys == []


@pytest.mark.parametrize("style", ["transformers", "vendor"])
@pytest.mark.parametrize("kind", [bridge.MiniMaxM3ForCausalLM, minimax_jax.MiniMaxM3ForCausalLM])
def test_state_dict_goes_round_in_both_styles(ours, style, kind):
    model = fresh(ours, kind)
    source = kind(CONFIG, ours.state()).state_dict(style=style)
    assert all(
        isinstance(t, torch.Tensor if kind is bridge.MiniMaxM3ForCausalLM else jax.Array) for t in source.values()
    )
    keys = model.load_state_dict(source)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert same_state(model, ours)


def test_tied_and_bfloat16_weights_go_round():
    config = CONFIG.replace(tie_word_embeddings=True)
    theirs = torch_model(config)
    model = bridge.MiniMaxM3ForCausalLM(config, weights_of(theirs, config)).to(torch.bfloat16)
    theirs = torch_model(config, seed=1).to(torch.bfloat16)
    assert model.load_state_dict(theirs.state_dict()) == ([], [])
    expected = theirs.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.float(), expected[name].float()), name  # the router is float32 here
    assert len(list(model.parameters())) == len(list(theirs.parameters()))


def test_writing_to_weights_that_were_given_out_or_in_reaches_no_model(ours):
    model = fresh(ours)
    given = ours.state_dict()
    model.load_state_dict(given)
    before = model(IDS).logits
    for tensor in (*given.values(), *model.state_dict().values(), *model.parameters()):
        tensor.fill_(7)
    assert torch.equal(model(IDS).logits, before) and same_state(model, ours)


def test_state_dict_that_does_not_fit_changes_nothing(ours):
    model, before = fresh(ours), fresh(ours)
    state = ours.state_dict()
    name = "model.layers.1.self_attn.q_proj.weight"
    for changed, message in (
        ({k: v for k, v in state.items() if k != name}, f"missing: {name}"),
        ({**state, "model.extra": state[name]}, "unexpected: model.extra"),
        ({**state, name: state[name][:3]}, rf"{name}: shape \[3, 64\]: must be \[256, 64\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(changed)
    with pytest.raises(ValueError, match="no name that starts as MiniMax-M3's do"):
        model.load_state_dict({"a": state[name]})
    with pytest.raises(ValueError, match="style = 'torch': must be 'transformers' or 'vendor'"):
        model.state_dict(style="torch")
    assert same_state(model, before)
    keys = model.load_state_dict({name: state[name], "model.extra": state[name]}, strict=False)
    assert keys.unexpected_keys == ["model.extra"] and len(keys.missing_keys) == len(state) - 1
    assert torch.equal(model.state_dict()[name], state[name])
    part = ours.state_dict(style="vendor")
    half = "language_model.model.layers.0.mlp.gate_proj.weight"
    model.load_state_dict({half: part[half]}, strict=False)  # half of a tensor that is one here
    assert torch.equal(model.state_dict(style="vendor")[half], part[half])


def test_modes_dtypes_and_devices(ours):
    model = fresh(ours)
    assert model.eval() is model and model.train(False) is model and model.requires_grad_(False) is model
    assert model.training is False and (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    for call in (model.train, model.requires_grad_):
        with pytest.raises(ValueError, match="mode = True: must be False"):
            call()
    expected = model(IDS).logits
    assert model.to(torch.bfloat16) is model and model.dtype == torch.bfloat16
    assert model.state()["layers.1.mlp.gate.weight"].dtype == jnp.float32
    logits = model(IDS).logits
    assert logits.dtype == torch.float32 and 0 < (logits - expected).abs().mean() < 0.1
    assert model.float().dtype == torch.float32 and model.to("cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert model.bfloat16().cpu().dtype == torch.bfloat16
    assert model.to(torch.device("cpu"), non_blocking=True).device.type == "cpu"
    assert model.to("cpu:3")._device == jax.devices("cpu")[3]
    plain = fresh(ours, minimax_jax.MiniMaxM3ForCausalLM)
    assert plain.dtype == jnp.float32 and plain.device == jax.devices("cpu")[0]
    for device in (None, 1, "cuda:0", torch.device("cuda:1")):
        if jax.default_backend() == "cpu":
            with pytest.raises(ValueError, match=r"device = 'cuda:[01]': must be one of JAX's devices \(cpu:0"):
                model.cuda(device)
            if isinstance(device, int):
                with pytest.raises(ValueError, match="device = 'cuda:1': must be one of JAX's devices"):
                    model.to(device)
    for target, message in (
        (torch.float16, r"dtype = torch.float16: must be 'auto', 'bfloat16' or 'float32'"),
        ("tpu", "device = 'tpu': must be one of JAX's devices"),
        ("cpu:99", "device = 'cpu:99'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.to(target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": "cuda:7"}, "device = 'cuda:7': must be one of JAX's devices"),
        ({"device_map": 7}, "device = 'cuda:7': must be one of JAX's devices"),
        ({"device_map": "cpu", "device": "cpu"}, "device and device_map: give one of them"),
        ({"dtype": "float16"}, "dtype = 'float16'"),
    ],
)
def test_from_pretrained_names_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        bridge.MiniMaxM3ForCausalLM.from_pretrained("tiny", **arguments)


def run_example(code, **names):
    """The names that the example's code leaves behind."""
    exec(code, names)
    return names


def test_transformers_usage_runs_with_only_the_import_changed(tmp_path, monkeypatch):
    """The example of transformers' documentation for the class, word for word, and the first one of docs/torch.md."""
    theirs = torch_model(pair_config(layers=2, max_position_embeddings=256, vocab_size=2048))
    theirs.save_pretrained(tmp_path)
    loaded_once = functools.cache(bridge.MiniMaxM3ForCausalLM.from_pretrained)  # and compiled once
    monkeypatch.setattr(bridge.MiniMaxM3ForCausalLM, "from_pretrained", loaded_once)
    shutil.copy(model_directory("tiny") / "tokenizer.json", tmp_path)
    lines = [line[4:] for line in inspect.getdoc(type(theirs).forward).splitlines() if line.startswith(">>> ")]
    example = re.sub(r'(?<=from_pretrained\(")[^"]+', str(tmp_path), "\n".join(lines))
    assert "AutoTokenizer.from_pretrained" in example and "model.generate(" in example
    own = "from transformers import AutoTokenizer, MiniMaxM3VLForCausalLM"
    changed = own.replace(", MiniMaxM3VLForCausalLM", "") + "\n"
    changed += "from minimax_jax.torch import MiniMaxM3ForCausalLM as MiniMaxM3VLForCausalLM"
    assert own in example
    expected = run_example(example)["generate_ids"]
    found = run_example(example.replace(own, changed))
    model, inputs = found["model"], found["inputs"]
    assert isinstance(model, bridge.MiniMaxM3ForCausalLM) and torch.equal(found["generate_ids"], expected)
    documented = DOCS.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    assert run_example(documented, directory=str(tmp_path))["model"] is model
    count = expected.shape[1] - inputs.input_ids.shape[1]
    assert torch.equal(model.generate(**inputs.to(model.device), max_new_tokens=count), expected)
    model.save_pretrained(tmp_path / "again")
    again = transformers.MiniMaxM3VLForCausalLM.from_pretrained(tmp_path / "again")
    assert all(
        torch.equal(a, b) for a, b in zip(again.state_dict().values(), theirs.state_dict().values(), strict=True)
    )


def test_generation_configs_of_both_libraries(ours):
    expected = ours.generate(IDS, max_new_tokens=6)
    for config in (
        GenerationConfig(max_new_tokens=6),
        transformers.GenerationConfig(max_new_tokens=6, do_sample=False),
        transformers.GenerationConfig(max_length=26),
        {"max_new_tokens": 6},
        {"max_length": np.int64(26)},
    ):
        assert torch.equal(ours.generate(IDS, generation_config=config), expected)
    sampled = transformers.GenerationConfig(max_new_tokens=6, do_sample=True, temperature=2.0)
    assert torch.equal(ours.generate(IDS, generation_config=sampled, do_sample=False), expected)
    options, asked = generation_options(GenerationConfig(), sampled, {"top_k": 4}, 20)
    assert asked and (options.do_sample, options.temperature, options.top_k) == (True, 2.0, 4)
    end = int(expected[0, 21])
    stopped = ours.generate(IDS, max_new_tokens=6, eos_token_id=end, pad_token_id=77)
    assert stopped[0, 22:].tolist() == [77] * (stopped.shape[1] - 22)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = ours.generate(IDS, max_new_tokens=6, num_beams=1, repetition_penalty=1.0, use_cache=True, min_p=None)
    assert torch.equal(same, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_beams": 4}, ValueError, "num_beams = 4: must be 1 "),
        ({"repetition_penalty": 1.2}, ValueError, "repetition_penalty = 1.2: must be 1.0 "),
        ({"logits_processor": [lambda ids, scores: scores]}, ValueError, "logits_processor = "),
        ({"use_cache": False}, ValueError, "use_cache = False: must be True "),
        ({"generation_config": {"stop_strings": ["a"]}}, ValueError, "stop_strings = "),
        ({"generation_config": 3}, ValueError, "generation_config is int: must be a GenerationConfig or a mapping"),
        ({"max_length": 20}, ValueError, "max_length = 20: must be an integer above the prompts' length, 20"),
        ({"max_length": 30, "max_new_tokens": 3}, ValueError, "max_length and max_new_tokens: give one"),
        ({"max_length": 300}, ValueError, "max_new_tokens = 280: at most 236 fit"),
        ({"pad_token_id": 96}, ValueError, "pad_token_id = 96: must be within 0..95"),
        ({"max_tokens": 3}, TypeError, r"generate\(\) got an unexpected keyword argument 'max_tokens'"),
    ],
)
def test_options_that_are_not_served_are_named(ours, arguments, error, message):
    with pytest.raises(error, match=message):
        ours.generate(IDS, **arguments)
