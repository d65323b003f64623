"""The name tables: complete, tiling, invertible, and good for ranges."""

import numpy as np
import pytest
from checkpoint_samples import mxfp8_config, small_config, vendor_state, vendor_tensors, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_jax.checkpoint import STYLES, detect_style, plan_load, state_tensors
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.tensor_table import tensor_table


@pytest.mark.parametrize("config", [MiniMaxM3Config.m3(), small_config(), small_config(tie_word_embeddings=True)])
def test_vendor_names_are_those_of_the_tensor_table(config: MiniMaxM3Config) -> None:
    text = tensor_table(config.replace(vision=None))
    pieces = [p for tensor in state_tensors(config, STYLES["vendor"]).values() for p in tensor.pieces]
    assert len(pieces) == len(text) and {p.name: p.shape for p in pieces} == {n: s.shape for n, s in text.items()}
    for name in set(tensor_table(config)) - set(text):
        assert STYLES["vendor"].ignores(name)


def test_quantisable_pieces_are_those_that_the_mxfp8_release_quantises() -> None:
    config = MiniMaxM3Config.m3_mxfp8()
    table = tensor_table(config.replace(vision=None))
    for tensor in state_tensors(config, STYLES["vendor"]).values():
        for piece in tensor.pieces:
            assert piece.quantisable == (table[piece.name].dtype == "F8_E4M3")
            assert tensor.float32 == (table[piece.name].dtype == "F32")


@pytest.mark.parametrize("style", STYLES)
def test_pieces_tile_each_state_tensor_and_cut_back_to_the_stored_shape(style: str) -> None:
    for tensor in state_tensors(small_config(), STYLES[style]).values():
        covered = np.zeros(tensor.shape, int)
        for piece in tensor.pieces:
            region = covered[piece.state_index]
            region += 1
            assert (np.swapaxes(region, -1, -2) if piece.transposed else region).shape == piece.shape
        assert (covered == 1).all(), tensor.name


def test_styles_have_the_same_state() -> None:
    states = [{n: t.shape for n, t in state_tensors(small_config(), s).items()} for s in STYLES.values()]
    assert states[0] == states[1] == states[2]
    assert states[0] == {n: v.shape for n, v in vendor_state(small_config(), vendor_tensors(small_config())).items()}


@pytest.mark.parametrize("style", STYLES)
def test_detects_the_style(style: str) -> None:
    names = [p.name for t in state_tensors(small_config(), STYLES[style]).values() for p in t.pieces]
    vision = ["vision_tower.vision_model.pre_layrnorm.weight", "model.vision_tower.pre_layrnorm.weight"]
    assert detect_style([*vision, *names, "model.mtp.layers.0.enorm.weight"]) is STYLES[style]


def test_other_names_are_of_no_style() -> None:
    assert detect_style(["transformer.wte.weight", "lm_head.weight"]) is None
    assert detect_style([]) is None


@pytest.fixture(scope="module", params=["bf16", "mxfp8"])
def plan(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    config = small_config() if request.param == "bf16" else mxfp8_config()
    tensors = vendor_tensors(config)
    directory = tmp_path_factory.mktemp(request.param)
    write_checkpoint(directory, tensors)
    with plan_load(directory, config, "float32") as opened:
        yield opened, vendor_state(config, tensors)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_range_of_any_tensor_can_be_read_alone(plan, data: st.DataObject) -> None:
    opened, state = plan
    name = data.draw(st.sampled_from(sorted(state)))
    ranges = tuple(
        tuple(sorted(data.draw(st.tuples(*[st.integers(0, extent)] * 2)))) for extent in opened.tensors[name].shape
    )
    expected = state[name][tuple(slice(*r) for r in ranges)]
    np.testing.assert_array_equal(opened.read(name, ranges), expected)


def test_a_range_reads_only_the_pieces_it_meets(plan) -> None:
    opened, _ = plan
    experts = opened.tensors["layers.1.mlp.experts.gate_up_proj"]
    reads = list(experts.reads(((2, 3), (0, 64), (0, 32))))  # the gate of expert 2
    assert [r.piece.name for r in reads] == ["language_model.model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    with pytest.raises(ValueError, match="must lie within"):
        experts.reads(((0, 5), (0, 64), (0, 32)))
    with pytest.raises(ValueError, match="must lie within"):
        experts.reads(((0, 4), (0, 64)))
