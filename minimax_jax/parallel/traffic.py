"""What a layout moves between devices and reads of its weights, counted, for the times that can be expected."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.parallel.config import HEADS, REQUESTS, TOKENS, ParallelConfig
from minimax_jax.parallel.layout import Layout

_CHOICE_BYTES = 8  # an expert's number and weight
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s that an H100 or H200 can send, and its own network adapter


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one layer with experts, a token of the whole batch; ring algorithms.

    Attributes:
      attention, experts: bytes that one rank sends after attention, and to and from the experts.
      between_hosts: of all that one host's ranks send, what goes to other hosts.
      collectives: how many there are, each of which waits for all its ranks.
      levels: whether `between_hosts` goes in collectives of its own, and `attention` and `experts` stay within a host.
    """

    attention: float
    experts: float
    between_hosts: float
    collectives: int
    levels: bool = False

    def seconds(self, tokens: int, layers: int, devices_per_host: int = 8) -> float:
        """Time of a step's layers. Rings over hosts run at the slower of both rates, levels one after the other.

        Nothing overlaps with computation, and latency, which small steps consist of, is left out.

        Args:
          tokens: of the whole batch.
        """
        inside = (self.attention + self.experts) / NVLINK
        between = self.between_hosts / (devices_per_host * INFINIBAND)
        return tokens * layers * (inside + between if self.levels else max(inside, between))


def layer_traffic(
    config: MiniMaxM3Config,
    parallel: ParallelConfig,
    *,
    itemsize: int = 2,
    devices_per_host: int = 8,
    all_to_all: bool = False,
) -> Traffic:
    """Counts what `MeshComm` does in a layer.

    A rank of n sends 2 (n-1)/n of what is all-reduced, and (n-1)/n of what is gathered or scattered in the end. A ring
    that has ranks on several hosts leaves each of them once, with as many bytes. In an all-to-all each of the
    `rank_chance` * (n-1) other ranks of a token gets it from its own rank.

    Args:
      itemsize: bytes of a hidden state's numbers.
      all_to_all: whether the step is one that sends tokens to their experts' ranks only
        (`ParallelConfig.all_to_all_tokens`).

    Raises:
      ValueError: for an all-to-all over hosts, of which nothing is counted.
    """
    if all_to_all and parallel.num_devices > devices_per_host:
        raise ValueError(f"all_to_all = True: must be within a host of {devices_per_host} devices")
    hidden, hosts = config.hidden_size * itemsize, parallel.hosts
    data, group = parallel.attention_data, parallel.size(TOKENS)
    others = (data - 1) / data

    def reduced(ranks: int) -> float:
        return 2 * (ranks - 1) / ranks * hidden / data

    choices = others * _CHOICE_BYTES * config.num_experts_per_tok
    attention, experts = reduced(parallel.tensor), reduced(group)
    rings = functools.partial(_rings_between_hosts, config, parallel, devices_per_host=devices_per_host)
    between = attention * rings(HEADS) + experts * rings(TOKENS) + choices * rings(REQUESTS)
    if hosts > 1:
        local = data // hosts * group  # ranks of a host that put rows together
        rows = 2 * (local - 1) / local * hidden
        between += 2 * (hosts - 1) / hosts * hidden
    else:
        rows = 2 * others * hidden * (rank_chance(config, parallel) if all_to_all else 1)
        between += rows * rings(REQUESTS)
    steps = 5 - 2 * (data == hosts and group == 1) if hosts > 1 else 3
    return Traffic(
        attention=attention,
        experts=experts + rows + choices,
        between_hosts=between,
        collectives=sum((parallel.tensor > 1, group > 1, steps * (data > 1))),
        levels=hosts > 1,
    )


def rank_chance(config: MiniMaxM3Config, parallel: ParallelConfig) -> float:
    """How likely one of a token's evenly chosen experts, or several, are on a given rank."""
    away = config.num_local_experts - Layout(config, parallel).experts_per_rank
    return 1 - math.comb(away, config.num_experts_per_tok) / math.comb(
        config.num_local_experts, config.num_experts_per_tok
    )


def weight_bytes_read(
    config: MiniMaxM3Config,
    parallel: ParallelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    tokens: int,
    *,
    itemsize: int = 2,
) -> float:
    """Bytes of weights that one rank reads in a step: all but the embedding, and of the experts those that are chosen.

    Args:
      shapes: of the model's weights, by name.
      tokens: of the whole batch, each of which chooses its experts evenly and alone.
      itemsize: bytes of a weight.
    """
    layout = Layout(config, parallel)
    chosen = 1 - (1 - config.num_experts_per_tok / config.num_local_experts) ** tokens
    total = 0.0
    for name, shape in shapes.items():
        if name != "embed_tokens":
            part = math.prod(layout.local_shape(shape, layout.splits(name)))
            total += part * itemsize * (chosen if ".experts." in name else 1)
    return total


def _rings_between_hosts(
    config: MiniMaxM3Config, parallel: ParallelConfig, axes: tuple[str, ...], *, devices_per_host: int
) -> int:
    """Groups of ranks along some axes of the mesh that the first host shares with others."""
    layout, ranks = Layout(config, parallel), range(parallel.num_devices)
    others = tuple(axis for axis in parallel.axis_sizes if axis not in axes)
    ring_of = np.array([layout.place(others, rank) for rank in ranks])
    on_first = set(ring_of[:devices_per_host])
    return len(on_first & set(ring_of[devices_per_host:]))
