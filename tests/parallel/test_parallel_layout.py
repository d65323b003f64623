"""The layout table: every tensor has a rule, parts tile the whole, modules of one rank have these shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from parallel_models import LAYOUTS, four_head_config, name_of, one_device, spread

from minimax_jax import MiniMaxM3Config
from minimax_jax.model import abstract_model, split_model
from minimax_jax.parallel import Layout, ParallelConfig
from minimax_jax.parallel.layout import boxes


def shapes_of(config):
    return {name: struct.shape for name, struct in split_model(abstract_model(config, jnp.float32))[1].items()}


@pytest.mark.parametrize("sizes", LAYOUTS, ids=name_of)
def test_modules_of_one_rank_have_the_tables_shapes(sizes):
    config = MiniMaxM3Config.m3().replace(
        num_hidden_layers=4,
        layer_types=MiniMaxM3Config.m3().layer_types[:4],
        mlp_layer_types=("dense",) * 3 + ("sparse",),
    )
    layout = Layout(config, ParallelConfig(*sizes))
    local, sizes_of = shapes_of(layout.local_config), layout.parallel.axis_sizes
    for name, shape in shapes_of(config).items():
        splits = layout.splits(name)
        part = layout.local_shape(shape, splits)
        built = local[name]
        if ".experts." in name:  # the config keeps the model's count for the router
            built = (layout.experts_per_rank, *built[1:])
        assert part == built, name
        spec, whole = layout.spec(splits), layout.global_shape(shape, splits)
        sharding = NamedSharding(jax.sharding.AbstractMesh(tuple(sizes_of.values()), tuple(sizes_of)), spec)
        assert sharding.shard_shape(whole) == part
    if sizes[0] == 8:  # what every rank has, and K/V twice, is small beside its eighth of the rest
        held = sum(np.prod(layout.local_shape(s, layout.splits(n))) for n, s in shapes_of(config).items())
        whole = sum(np.prod(s) for s in shapes_of(config).values())
        assert held < whole / 8 * 1.01


@pytest.mark.parametrize("sizes", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("heads", [(4, 4), (2, 1), (4, 8)], ids=str)
def test_parts_tile_the_whole_and_heads_stay_together(sizes, heads):
    kv_heads, index_heads = heads
    config = four_head_config(num_key_value_heads=kv_heads, index_n_heads=index_heads)
    layout = Layout(config, ParallelConfig(*sizes))
    ranks = range(layout.parallel.num_devices)
    for name, shape in shapes_of(config).items():
        splits = layout.splits(name)
        numbers = np.arange(np.prod(shape)).reshape(shape)
        parts = [layout.take(numbers, splits, rank) for rank in ranks]
        assert {part.shape for part in parts} == {layout.local_shape(shape, splits)}, name
        counts = np.bincount(np.concatenate([part.reshape(-1) for part in parts]), minlength=numbers.size)
        assert len(set(counts.tolist())) == 1, name  # nobody misses anything, everything is held equally often
        for rank, part in zip(ranks, parts, strict=True):
            assembled = np.empty_like(part)
            for box, index in boxes(layout.ranges(shape, splits, rank)):
                assembled[index] = numbers[tuple(slice(*extent) for extent in box)]
            np.testing.assert_array_equal(assembled, part)

    def held(name, count, rank):
        part = layout.take(np.arange(count)[None], layout.splits(f"layers.1.self_attn.{name}"), rank)
        return part.reshape(-1).tolist()

    for rank in ranks:
        queries = held("q_proj", 8, rank)
        assert held("k_proj", kv_heads, rank) == held("v_proj", kv_heads, rank)
        assert held("k_proj", kv_heads, rank) == sorted({head * kv_heads // 8 for head in queries})
        assert held("index_q_proj", index_heads, rank) == sorted({head * index_heads // 8 for head in queries})


def test_gate_and_up_of_a_rank_belong_together():
    layout = Layout(four_head_config(), ParallelConfig(tensor=4))
    part = layout.take(np.arange(96)[None], layout.splits("layers.0.mlp.gate_up_proj"), 1)[0]
    np.testing.assert_array_equal(part, [*range(12, 24), *range(60, 72)])
    down = layout.take(np.arange(48)[:, None], layout.splits("layers.0.mlp.down_proj"), 1)[:, 0]
    np.testing.assert_array_equal(down, range(12, 24))


def test_a_tensor_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="'layers.0.mlp.other': no rule"):
        Layout(four_head_config(), ParallelConfig()).splits("layers.0.mlp.other")


@pytest.mark.parametrize("sizes", [(8, 2, 1), (2, 8, 4), (4, 8, 1)], ids=name_of)
def test_weights_come_back_whole(sizes):
    model = one_device()
    for name, leaf in spread(model, sizes).state().items():
        np.testing.assert_array_equal(leaf, model.state()[name], err_msg=name)
