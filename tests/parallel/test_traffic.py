"""What layouts move: the collectives' own count, and the tables of docs/parallel.md."""

from pathlib import Path

import jax.numpy as jnp
import pytest
from parallel_models import LAYOUTS, name_of

from minimax_jax import MiniMaxM3Config
from minimax_jax.model import abstract_model, split_model
from minimax_jax.parallel import ParallelConfig
from minimax_jax.parallel.traffic import layer_traffic, rank_chance, weight_bytes_read

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "parallel.md").read_text(encoding="utf-8")
HBM = {8: 4.8e12, 16: 3.35e12}  # H200, H100: bytes/s


def rows(columns: int) -> dict[tuple[int, ...], list[str]]:
    """Rows of the documentation's table with so many columns of figures, by layout."""
    found = {}
    for line in DOCS.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == columns + 1 and cells[0].startswith("`") and cells[0][1].isdigit():
            found[tuple(map(int, cells[0].split("`")[1].split(",")))] = cells[1:]
    return found


@pytest.mark.parametrize("sizes", LAYOUTS, ids=name_of)
def test_on_one_host_nothing_leaves_it_and_one_device_says_nothing(sizes):
    traffic = layer_traffic(MiniMaxM3Config.m3(), ParallelConfig(*sizes))
    assert traffic.between_hosts == 0 and traffic.experts > 0 and traffic.collectives > 0
    silent = layer_traffic(MiniMaxM3Config.m3(), ParallelConfig())
    assert (silent.attention, silent.experts, silent.collectives) == (0, 0, 0)


def test_the_documentations_moves_are_what_the_formula_gives():
    table = rows(7)
    assert len(table) == 10 and {max(t * d, e) for t, e, d in table} == {8, 16}
    for sizes, shown in table.items():
        traffic = layer_traffic(MiniMaxM3Config.m3(), ParallelConfig(*sizes))
        counts = (traffic.attention, traffic.experts, traffic.between_hosts, traffic.collectives)
        small, middle, large = (traffic.seconds(tokens, 60) * 1e3 for tokens in (64, 1024, 8192))
        assert shown == [*(f"{count:.0f}" for count in counts), f"{small:.2f}", f"{middle:.1f}", f"{large:.1f}"]


def test_the_documentations_ways_to_the_experts_are_what_the_formula_gives():
    config, table, hosts = MiniMaxM3Config.m3(), rows(5), rows(6)
    assert set(table) == {(4, 8, 2), (2, 8, 4), (1, 8, 8)} and len(hosts) == 4
    for sizes, shown in table.items():
        gather, exchange = (layer_traffic(config, ParallelConfig(*sizes), all_to_all=way) for way in (False, True))
        less = [(gather.seconds(tokens, 1) - exchange.seconds(tokens, 1)) * 1e6 for tokens in (64, 1024, 8192)]
        assert shown == [f"{gather.experts:.0f}", f"{exchange.experts:.0f}", *(f"{us:.1f}" for us in less)]
    for sizes, shown in hosts.items():
        traffic = layer_traffic(config, ParallelConfig(*sizes, hosts=2))
        counts = (traffic.experts, traffic.between_hosts, traffic.collectives)
        small, middle, large = (traffic.seconds(tokens, 60) * 1e3 for tokens in (64, 1024, 8192))
        assert shown == [*(f"{count:.0f}" for count in counts), f"{small:.2f}", f"{middle:.1f}", f"{large:.1f}"]
    assert rank_chance(config, ParallelConfig(1, 8, 8)) == pytest.approx(0.4178, abs=5e-5)
    with pytest.raises(ValueError, match="within a host"):
        layer_traffic(config, ParallelConfig(1, 16, 16), all_to_all=True)


def test_two_groups_on_two_hosts_send_a_token_between_them_from_every_rank():
    traffic = layer_traffic(MiniMaxM3Config.m3(), ParallelConfig(8, 16, 2))
    assert traffic.between_hosts == 8 * (6144 * 2 * 2 + 4 * 8) / 2


def test_the_documentations_expected_steps_are_what_the_formula_gives():
    config = MiniMaxM3Config.m3()
    kinds = [config.is_sparse(i) for i in range(config.num_hidden_layers)]
    assert kinds == sorted(kinds) and config.mlp_layer_types == tuple("sparse" if kind else "dense" for kind in kinds)
    few = config.replace(
        num_hidden_layers=2, layer_types=config.layer_types[::59], mlp_layer_types=config.mlp_layer_types[::59]
    )
    own = {name: x.shape for name, x in split_model(abstract_model(few, jnp.bfloat16))[1].items()}
    shapes = {name: shape for name, shape in own.items() if not name.startswith("layers.")}
    for layer, sparse in enumerate(kinds):  # a layer of each kind stands for all of them
        kind = f"layers.{int(sparse)}."
        shapes |= {name.replace(kind, f"layers.{layer}."): x for name, x in own.items() if name.startswith(kind)}
    table = rows(4)
    assert len(table) == 6
    for sizes, shown in table.items():
        parallel = ParallelConfig(*sizes)
        read = weight_bytes_read(config, parallel, shapes, 64)
        reading = read / HBM[parallel.num_devices] * 1e3
        moving = layer_traffic(config, parallel).seconds(64, 60) * 1e3
        assert shown == [f"{read / 1e9:.1f}", f"{reading:.1f}", f"{moving:.2f}", f"{reading + moving:.1f}"]
