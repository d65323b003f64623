"""Against transformers itself: what it saves loads here, what is saved here loads there, bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_samples import BF16, assert_same_state, is_router, random_state, small_config, write_checkpoint

from minimax_jax.checkpoint import check_checkpoint, load_state, save_state
from minimax_jax.config import MiniMaxM3Config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 32,
}


def to_numpy(tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.uint16).numpy().view(BF16)
    return tensor.detach().numpy()


def randomise(model: Any) -> None:
    """Different numbers everywhere, also where transformers begins with zeros (norms, routing bias)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, tensor in sorted(model.state_dict().items()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))


def state_of(model: Any, config: MiniMaxM3Config, body: str) -> dict[str, np.ndarray]:
    """The state by transformers' own module names, spelled out here once more."""
    weights = {name: to_numpy(tensor) for name, tensor in model.state_dict().items()}
    state = {}
    for name, value in weights.items():
        if name == "lm_head.weight":
            if not config.tie_word_embeddings:
                state["lm_head"] = value.T
        elif name.startswith(body):
            name = name.removeprefix(body).replace("self_attn.indexer.", "self_attn.index_")
            linear = name.endswith("_proj.weight")
            short = name.removesuffix(".weight") if linear or name == "embed_tokens.weight" else name
            turn = linear or ".experts." in name or name.endswith("mlp.gate.weight")
            value = np.swapaxes(value, -1, -2) if turn else value
            state[short] = value.astype(np.float32) if is_router(short) else value
    return state


def text_model(config: MiniMaxM3Config, dtype: Any) -> Any:
    model = transformers.MiniMaxM3VLForCausalLM(transformers.MiniMaxM3VLTextConfig(**config.to_dict("transformers")))
    randomise(model)
    return model.to(dtype)


def multimodal_model(config: MiniMaxM3Config) -> Any:
    sizes = {"projector_hidden_size": 64, "tie_word_embeddings": config.tie_word_embeddings}
    model = transformers.MiniMaxM3SparseForConditionalGeneration(
        transformers.MiniMaxM3VLConfig(text_config=config.to_dict("transformers"), vision_config=VISION, **sizes)
    )
    randomise(model)
    return model


def reload_strictly(directory: Path, dtype: Any) -> Any:
    model, info = transformers.MiniMaxM3VLForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], (kind, info[kind])
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_a_text_model_that_transformers_saved(tmp_path: Path, tied: bool, dtype: Any, shard_size: str) -> None:
    config = small_config(tie_word_embeddings=tied)
    model = text_model(config, dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors").exists() == (shard_size == "5GB")
    read_config = MiniMaxM3Config.from_pretrained(tmp_path)
    state = load_state(tmp_path, read_config, str(dtype).removeprefix("torch."), progress=False)
    assert_same_state(state, state_of(model, config, "model."))
    report = check_checkpoint(tmp_path, read_values=True)
    assert report.ok and report.style == "transformers", report.problems


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [5e9, 100_000])
def test_transformers_loads_what_is_saved_here(tmp_path: Path, tied: bool, dtype: Any, limit: float) -> None:
    config = small_config(tie_word_embeddings=tied)
    state = random_state(config, np.dtype(np.float32) if dtype == torch.float32 else BF16)
    save_state(state, config, tmp_path, max_shard_bytes=limit)
    model = reload_strictly(tmp_path, "auto")
    assert model.dtype == dtype
    theirs = state_of(model, config, "model.")
    if dtype == torch.bfloat16:  # transformers keeps no float32 router in a bfloat16 model: it rounds it
        state = {n: v.astype(BF16).astype(np.float32) if is_router(n) else v for n, v in state.items()}
    assert_same_state(theirs, state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_to_transformers_to_ours(tmp_path: Path, dtype: str) -> None:
    """Bit-equal; in bfloat16 the router's values are such that transformers' rounding keeps them."""
    config = small_config()
    state = random_state(config, np.dtype(np.float32) if dtype == "float32" else BF16)
    if dtype == "bfloat16":
        state = {n: v.astype(BF16).astype(np.float32) if is_router(n) else v for n, v in state.items()}
    save_state(state, config, tmp_path / "ours")
    reload_strictly(tmp_path / "ours", "auto").save_pretrained(tmp_path / "theirs")
    again = load_state(tmp_path / "theirs", MiniMaxM3Config.from_pretrained(tmp_path / "theirs"), dtype, progress=False)
    assert_same_state(again, state)


@pytest.mark.parametrize("tied", [False, True])
def test_a_multimodal_model_that_transformers_saved(tmp_path: Path, tied: bool) -> None:
    config = small_config(tie_word_embeddings=tied)
    model = multimodal_model(config)
    model.save_pretrained(tmp_path)
    read_config = MiniMaxM3Config.from_pretrained(tmp_path)
    assert read_config.vision is not None
    state = load_state(tmp_path, read_config, "float32", progress=False)
    assert_same_state(state, state_of(model, config, "model.language_model."))
    report = check_checkpoint(tmp_path, read_values=True)
    assert report.ok and report.style == "vendor" and report.ignored > 10, report.problems


def test_the_wrapper_s_names_in_memory(tmp_path: Path) -> None:
    config = small_config()
    model = multimodal_model(config)
    write_checkpoint(tmp_path, {name: to_numpy(tensor) for name, tensor in model.state_dict().items()})
    expected = state_of(model, config, "model.language_model.")
    assert_same_state(load_state(tmp_path, config, "float32", progress=False), expected)


def test_a_vendor_checkpoint_means_the_same_to_transformers(tmp_path: Path) -> None:
    """The vendor's names through transformers' own conversion and through ours give one model."""
    config = small_config()
    model = multimodal_model(config)
    model.save_pretrained(tmp_path)
    theirs = transformers.MiniMaxM3SparseForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_state(tmp_path, MiniMaxM3Config.from_pretrained(tmp_path), "float32", progress=False)
    assert_same_state(ours, state_of(theirs, config, "model.language_model."))
