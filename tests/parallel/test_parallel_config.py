"""Which sizes are possible, and what the others' errors say; meshes."""

import jax
import pytest
from parallel_models import LAYOUTS, four_head_config, name_of

from minimax_jax import MiniMaxM3Config, MiniMaxM3ForCausalLM
from minimax_jax.parallel import ParallelConfig, ParallelError, make_mesh


@pytest.mark.parametrize("sizes", LAYOUTS, ids=name_of)
def test_axes_multiply_to_what_was_asked_for(sizes):
    tensor, expert, data = sizes
    parallel = ParallelConfig(*sizes)
    axes = parallel.axis_sizes
    assert axes["data"] == data and axes["outer"] * axes["inner"] == tensor
    assert axes["data"] * axes["replica"] * axes["outer"] == expert
    assert parallel.num_devices == axes["data"] * axes["replica"] * axes["outer"] * axes["inner"]
    parallel.check(MiniMaxM3Config.m3(), 8)
    parallel.check(MiniMaxM3Config.m3_mxfp8(), 8)
    mesh = make_mesh(parallel)
    assert dict(mesh.shape) == axes
    assert list(mesh.devices.flat) == jax.devices()[: parallel.num_devices]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "tensor = 3: must be one of 1, 2, 4, 8"),
        ((0, 1, 1), "tensor = 0: must be an integer >= 1"),
        ((True, 1, 1), "tensor = True: must be an integer >= 1"),
        ((1, 1.0, 1), "expert = 1.0: must be an integer >= 1"),
        ((1, 2, 4), "expert = 2: must be a multiple of attention_data = 4"),
        ((4, 6, 1), "expert = 6: must be a divisor or a multiple of tensor * attention_data = 4"),
    ],
)
def test_sizes_that_do_not_fit_each_other(sizes, message):
    with pytest.raises(ParallelError) as error:
        ParallelConfig(*sizes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ((1, 3, 1), {}, "expert = 3: must divide num_local_experts = 8"),
        ((8, 1, 1), {"num_attention_heads": 4}, "tensor = 8: must divide num_attention_heads = 4"),
        (
            (2, 1, 1),
            {"num_attention_heads": 6, "num_key_value_heads": 3, "index_n_heads": 3},
            "tensor = 2: must be a divisor or a multiple of num_key_value_heads = 3",
        ),
        ((8, 1, 1), {"vocab_size": 100}, "ranks with the same tokens (replica * outer * inner) = 8: must divide vocab"),
        ((8, 1, 1), {"intermediate_size": 12}, "ranks to an expert = 8: must divide intermediate_size = 12"),
        ((1, 16, 1), {"num_local_experts": 16}, "need 16 devices, must be at most 8, the ones there are"),
    ],
)
def test_models_that_cannot_be_spread_so(sizes, changes, message):
    parallel, config = ParallelConfig(*sizes), four_head_config(**changes)
    with pytest.raises(ParallelError) as error:
        parallel.check(config, 8)
    assert message in str(error.value)


def test_one_error_lists_everything():
    with pytest.raises(ParallelError) as error:
        ParallelConfig(8, 24, 1).check(four_head_config(vocab_size=100, num_attention_heads=4), 8)
    text = str(error.value)
    assert "need 24 devices" in text and "num_attention_heads = 4" in text and "vocab_size = 100" in text
    assert "num_local_experts = 8" in text


def test_wrong_sizes_are_refused_before_anything_is_read(monkeypatch):
    from minimax_jax.checkpoint.files import CheckpointFiles

    def opened(*_):
        raise AssertionError("the checkpoint was opened")

    monkeypatch.setattr(CheckpointFiles, "open", opened)
    with pytest.raises(ParallelError, match="expert = 5: must divide num_local_experts = 16"):
        MiniMaxM3ForCausalLM.from_pretrained("tiny", parallel=ParallelConfig(1, 5, 1))
    with pytest.raises(ValueError, match="device and parallel: give one of them"):
        MiniMaxM3ForCausalLM.from_pretrained("tiny", device=jax.devices()[0], parallel=ParallelConfig())
    with pytest.raises(ParallelError, match="devices: 8 of them, must be at least 16"):
        make_mesh(ParallelConfig(8, 16, 2))
