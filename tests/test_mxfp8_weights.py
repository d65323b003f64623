"""Weights that stay in 8 bits: the same numbers as multiplied out, on one device and on ranks, in every interface."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from minimax_jax import LLM, MiniMaxM3Config, MiniMaxM3ForCausalLM, SamplingParams
from minimax_jax.checkpoint import STYLES, CheckpointFiles, dequantize_mxfp8, save_state, state_tensors
from minimax_jax.checkpoint.quantize import quantize_checkpoint
from minimax_jax.loss import causal_lm_loss
from minimax_jax.mxfp8_parts import for_kernels, values_in_rows
from minimax_jax.parallel import ParallelConfig, ParallelError
from minimax_kernels import Mxfp8
from minimax_kernels.mxfp8 import interleave, straighten

HELD_OUT = Path(__file__).parent / "data" / "held_out.txt"
PROMPT = list(range(3, 43))


def small_config(**changes) -> MiniMaxM3Config:
    """A dense and a sparse layer whose every matrix two ranks can share in blocks of 32 inputs."""
    sizes = {
        "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 32, "rotary_dim": 16, "dense_intermediate_size": 64, "intermediate_size": 64,
        "shared_intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "index_n_heads": 1,
        "index_head_dim": 32, "index_block_size": 16, "index_topk_blocks": 2, "max_position_embeddings": 512,
        "layer_types": ("full_attention", "minimax_m3_sparse"), "mlp_layer_types": ("dense", "sparse"),
    }  # fmt: skip
    return MiniMaxM3Config(**{**sizes, **changes})


def write_mxfp8(folder: Path, config: MiniMaxM3Config) -> Path:
    """An MXFP8 checkpoint of random weights, large enough that greedy choices are clear."""
    random, state = np.random.default_rng(0), {}
    for name, tensor in state_tensors(config, STYLES["vendor"]).items():
        scale = 0.25 if len(tensor.shape) > 1 and not tensor.float32 else 0.02
        state[name] = (scale * random.standard_normal(tensor.shape)).astype(np.float32)
    save_state(state, config, folder / "floats", style="vendor")
    quantize_checkpoint(folder / "floats", folder / "mxfp8")
    return folder / "mxfp8"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_mxfp8(tmp_path_factory.mktemp("small"), small_config())


@pytest.fixture(scope="module")
def kept(small) -> MiniMaxM3ForCausalLM:
    return MiniMaxM3ForCausalLM.from_pretrained(small)


@pytest.fixture(scope="module")
def floats(small) -> MiniMaxM3ForCausalLM:
    return MiniMaxM3ForCausalLM.from_pretrained(small, quantization="none")


def quantised(model) -> dict[str, Mxfp8]:
    return {name: leaf for name, leaf in model.state().items() if isinstance(leaf, Mxfp8)}


def meant(leaf: Mxfp8) -> np.ndarray:
    """What it stands for, by the definition that the files are read with."""
    return dequantize_mxfp8(straighten(np.asarray(leaf.values)), np.asarray(leaf.scales)).swapaxes(-1, -2)


def test_linears_and_experts_stay_in_8_bits_and_mean_the_same(kept, floats):
    state = floats.state()
    names = {name for name, leaf in state.items() if leaf.ndim > 1 and "embed" not in name and "lm_head" not in name}
    assert set(quantised(kept)) == {name for name in names if ".gate." not in name} and not quantised(floats)
    for name, leaf in kept.state().items():
        np.testing.assert_array_equal(meant(leaf) if isinstance(leaf, Mxfp8) else leaf, state[name], err_msg=name)
    assert kept.num_parameters() == floats.num_parameters() == sum(leaf.size for leaf in state.values())
    assert kept.get_memory_footprint() < 0.5 * floats.get_memory_footprint()
    assert kept.dtype == jnp.float32


@pytest.fixture(scope="module")
def spread(small) -> MiniMaxM3ForCausalLM:
    return MiniMaxM3ForCausalLM.from_pretrained(small, parallel=ParallelConfig(tensor=2, expert=2))


@pytest.mark.parametrize("parallel", [None, ParallelConfig(tensor=2)], ids=["one", "tp2"])
def test_a_nan_among_values_reaches_the_scale_of_its_block(small, kept, parallel, tmp_path):
    """Where kernels look for it; the other blocks stay as they are."""
    shutil.copytree(small, tmp_path / "m")
    with CheckpointFiles.open(small) as files:
        tensors = {name: np.array(files.read(name)) for name in files.names()}
    tensors["language_model.model.layers.0.self_attn.o_proj.weight"].view(np.uint8)[5, 70] = 0xFF
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    model = MiniMaxM3ForCausalLM.from_pretrained(tmp_path / "m", parallel=parallel)
    for name, leaf in quantised(model).items():
        expected = np.array(kept.state()[name].scales)
        if name == "layers.0.self_attn.o_proj":
            expected[5, 2] = 255
        np.testing.assert_array_equal(leaf.scales, expected, err_msg=name)


def test_an_engine_serves_it_over_ranks(spread, floats, small):
    """Through segments, whose weights are flat leaves; on one device `test_rank_slice.py` runs these too."""
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    limits = {"max_batch_size": 3, "max_num_tokens": 96, "max_seq_len": 64}
    prompts = [PROMPT, PROMPT[:9], PROMPT[5:30]]
    with LLM(spread, **limits, segment_config={"enabled": "always"}, cache_config={"page_size": 16}) as llm:
        answers = llm.generate(prompts, params, use_tqdm=False)
    logits = np.asarray(floats(prompts).logits)
    expected = [int(row[len(prompt) - 1].argmax()) for row, prompt in zip(logits, prompts, strict=True)]
    assert [answer.outputs[0].token_ids for answer in answers] == [[token] for token in expected]
    with pytest.raises(ValueError, match=r"quantization = 'int4': must be 'auto' or 'none'"):
        LLM(small, quantization="int4")


@pytest.mark.parametrize("expert", [2, 1])
def test_ranks_hold_their_part(small, kept, spread, expert):
    """With one KV head and one index head for two ranks, which then have their values and scales both."""
    model = spread
    if expert == 1:
        model = MiniMaxM3ForCausalLM.from_pretrained(small, parallel=ParallelConfig(tensor=2))
    for name, leaf in quantised(kept).items():
        whole = model.state()[name]
        assert isinstance(whole, Mxfp8)
        np.testing.assert_array_equal(np.asarray(whole.values).view(np.uint8), np.asarray(leaf.values).view(np.uint8))
        np.testing.assert_array_equal(whole.scales, leaf.scales, err_msg=name)
    leaves = dict(zip(model._names, model.leaves, strict=True))
    for name in ("k_proj", "v_proj", "index_q_proj"):
        leaf, whole = (own[f"layers.1.self_attn.{name}"] for own in (leaves, kept.state()))
        for array, expected in ((leaf.values, whole.values), (leaf.scales, whole.scales)):
            assert len(array.addressable_shards) == 2
            assert all(np.array_equal(shard.data, expected) for shard in array.addressable_shards), name
    down = leaves["layers.1.mlp.experts.down_proj"]
    parts = [{shard.data.shape for shard in leaf.addressable_shards} for leaf in (down.values, down.scales)]
    assert parts == ([{(2, 64, 64)}, {(2, 64, 2)}] if expert == 2 else [{(4, 64, 32)}, {(4, 64, 1)}])


def test_parts_of_other_blocks_than_the_whole_are_read_back_right():
    """96 inputs a device are in blocks of 32, the 192 of the whole would be in blocks of 64; a NaN marks its block."""
    random = np.random.default_rng(0)
    values = (random.standard_normal((4, 192)) * 30).astype(ml_dtypes.float8_e4m3fn)
    values.view(np.uint8)[1, 40] = 0xFF
    scales = random.integers(115, 125, (4, 6)).astype(np.uint8)
    split = NamedSharding(Mesh(jax.devices()[:2], "x"), PartitionSpec(None, "x"))
    weight = for_kernels(jax.device_put(values, split), jax.device_put(scales, split))
    np.testing.assert_array_equal(np.asarray(values_in_rows(weight)).view(np.uint8), values.view(np.uint8))
    for shard, own in zip(weight.values.addressable_shards, np.split(values, 2, axis=1), strict=True):
        np.testing.assert_array_equal(np.asarray(shard.data).view(np.uint8), interleave(own).view(np.uint8))
    scales[1, 1] = 255
    np.testing.assert_array_equal(weight.scales, scales)


def test_a_nan_that_load_state_dict_is_given_marks_its_block(small):
    model = MiniMaxM3ForCausalLM.from_pretrained(small)
    given = {name: np.array(array) for name, array in model.state_dict(style="vendor").items()}
    name = next(name for name in given if name.endswith("layers.0.self_attn.o_proj.weight"))
    given[name].view(np.uint8)[5, 70] = 0xFF
    model.load_state_dict(given)
    leaf = model.state()["layers.0.self_attn.o_proj"]
    assert np.asarray(leaf.scales)[5].tolist().count(255) == 1 and leaf.scales[5, 2] == 255


def test_ranks_do_not_share_a_block(tmp_path):
    folder = write_mxfp8(tmp_path, small_config(intermediate_size=32))
    layout = ParallelConfig(tensor=2)
    with pytest.raises(
        ParallelError, match=r"layers\.1\.mlp\.experts\.down_proj: 16 inputs a rank: must be a multiple"
    ):
        MiniMaxM3ForCausalLM.from_pretrained(folder, parallel=layout)
    assert MiniMaxM3ForCausalLM.from_pretrained(folder, parallel=layout, quantization="none").ranks


@pytest.mark.parametrize("style", ["vendor", "transformers"])
def test_saved_again(kept, floats, style, tmp_path):
    """In 8 bits byte for byte in the vendor's style; multiplied out in transformers'."""
    kept.save_pretrained(tmp_path / "again", style=style)
    again = MiniMaxM3ForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.is_mxfp8 == (style == "vendor") == bool(quantised(again))
    expected = kept if style == "vendor" else floats
    jax.tree.map(np.testing.assert_array_equal, again.state(), expected.state())


@pytest.mark.parametrize("style", ["vendor", "transformers"])
def test_state_dicts_go_out_and_come_in(small, kept, floats, style):
    given = kept.state_dict(style=style)
    name = next(name for name in given if name.endswith("layers.0.self_attn.q_proj.weight"))
    assert given[name].dtype == jnp.float8_e4m3fn and given[name].shape == (128, 64)
    assert given[name + "_scale_inv"].dtype == jnp.uint8 and given[name + "_scale_inv"].shape == (128, 2)
    other = MiniMaxM3ForCausalLM.from_pretrained(small)
    zeros = jax.device_put(jax.tree.map(np.zeros_like, other.state()))
    other._leaves[:] = zeros.values()
    assert other.load_state_dict(given) == ([], [])  # values and scales into 8 bits
    jax.tree.map(np.testing.assert_array_equal, other.state(), kept.state())
    other._leaves[:] = zeros.values()
    other.load_state_dict(floats.state_dict(style=style))  # floats into 8 bits
    for key, leaf in quantised(other).items():
        np.testing.assert_array_equal(meant(leaf), floats.state()[key], err_msg=key)
    into = MiniMaxM3ForCausalLM(floats.config, jax.device_put(jax.tree.map(np.zeros_like, floats.state())))
    into.load_state_dict(given)  # values and scales into floats
    jax.tree.map(np.testing.assert_array_equal, into.state(), floats.state())
    del given[name + "_scale_inv"]
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=rf"missing: {name}_scale_inv"):
            other.load_state_dict(given, strict=strict)
    assert sum(tensor.size for _, tensor in kept.named_parameters()) == kept.num_parameters() - 4  # a bias of experts
    assert any(key.endswith("_scale_inv") for key, _ in kept.named_buffers())


def test_casts_leave_it_in_8_bits(small):
    model = MiniMaxM3ForCausalLM.from_pretrained(small).bfloat16()
    assert model.dtype == jnp.bfloat16 and len(quantised(model)) > 10
    assert all(leaf.values.dtype == jnp.float8_e4m3fn for leaf in quantised(model).values())


def test_torch_gets_its_own_types(small):
    torch = pytest.importorskip("torch")
    from minimax_jax.torch import MiniMaxM3ForCausalLM as TorchModel

    model = TorchModel.from_pretrained(small)
    given = model.state_dict()
    types = {tensor.dtype for tensor in given.values()}
    assert types == {torch.float8_e4m3fn, torch.uint8, torch.float32}
    before = model.state()
    model.load_state_dict(given)
    jax.tree.map(np.testing.assert_array_equal, model.state(), before)


def test_the_trained_model_in_8_bits(tmp_path):
    """Logits as near as multiplied out, loss as the original's, no matrix at full size in floats on the device."""
    quantize_checkpoint("tiny", tmp_path / "q")
    original = MiniMaxM3ForCausalLM.from_pretrained("tiny", "bfloat16")
    text = HELD_OUT.read_text()
    ids = jnp.asarray([original.config.bos_token_id, *original.tokenizer.encode(text)][:250])[None]
    others = {id(array) for array in jax.live_arrays()}
    kept = MiniMaxM3ForCausalLM.from_pretrained(tmp_path / "q", "bfloat16")
    logits = kept(ids).logits
    shapes = {shape for leaf in quantised(kept).values() for shape in (leaf.shape, leaf.values.shape)}
    new = [array for array in jax.live_arrays() if id(array) not in others]
    assert sum(array.shape in shapes and array.dtype == jnp.float8_e4m3fn for array in new) == len(quantised(kept))
    assert not [array.shape for array in new if array.shape in shapes and array.dtype.itemsize > 1]
    floats = MiniMaxM3ForCausalLM.from_pretrained(tmp_path / "q", "bfloat16", quantization="none")
    multiplied_out = floats(ids).logits
    exact = MiniMaxM3ForCausalLM.from_pretrained(tmp_path / "q", "float32", quantization="none")(ids).logits
    errors = [float(jnp.sqrt(jnp.mean((given - exact) ** 2))) for given in (logits, multiplied_out)]
    assert errors[0] < 1.1 * errors[1] < 0.1  # sums in another order round otherwise
    floats._leaves[:] = original.leaves  # so that it runs in what is compiled
    kept_loss, same, before = (float(causal_lm_loss(x, ids)) for x in (logits, multiplied_out, floats(ids).logits))
    print(f"loss in 8 bits {kept_loss:.4f}, multiplied out {same:.4f}, in bfloat16 {before:.4f}")
    assert kept_loss == pytest.approx(same, rel=5e-3) and kept_loss == pytest.approx(before, rel=5e-3)
