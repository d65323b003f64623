"""What a layout moves between devices and reads of its weights, counted, for the times that can be expected."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.parallel.config import DATA, HEADS, TOKENS, ParallelConfig
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
    """

    attention: float
    experts: float
    between_hosts: float
    collectives: int

    def seconds(self, tokens: int, layers: int, devices_per_host: int = 8) -> float:
        """Time of a step's layers in which rings run at the slower of both rates, one after the other.

        Nothing overlaps with computation, and latency, which small steps consist of, is left out.

        Args:
          tokens: of the whole batch.
        """
        inside = (self.attention + self.experts) / NVLINK
        between = self.between_hosts / (devices_per_host * INFINIBAND)
        return tokens * layers * max(inside, between)


def layer_traffic(
    config: MiniMaxM3Config, parallel: ParallelConfig, *, itemsize: int = 2, devices_per_host: int = 8
) -> Traffic:
    """Counts what `MeshComm` does in a layer.

    A rank of n sends 2 (n-1)/n of what is all-reduced, and (n-1)/n of what is gathered or scattered in the end. A ring
    that has ranks on several hosts leaves each of them once, with as many bytes.

    Args:
      itemsize: bytes of a hidden state's numbers.
    """
    hidden = config.hidden_size * itemsize
    data, group = parallel.attention_data, parallel.size(TOKENS)

    def reduced(ranks: int) -> float:
        return 2 * (ranks - 1) / ranks * hidden / data

    gathered = (data - 1) / data * (2 * hidden + _CHOICE_BYTES * config.num_experts_per_tok)
    sent = ((HEADS, reduced(parallel.tensor)), (TOKENS, reduced(group)), ((DATA,), gathered))
    return Traffic(
        attention=sent[0][1],
        experts=sent[1][1] + sent[2][1],
        between_hosts=sum(
            number * _rings_between_hosts(config, parallel, axes, devices_per_host) for axes, number in sent
        ),
        collectives=sum((parallel.tensor > 1, group > 1, 3 * (data > 1))),
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
    config: MiniMaxM3Config, parallel: ParallelConfig, axes: tuple[str, ...], devices_per_host: int
) -> int:
    """Groups of ranks along some axes of the mesh that the first host shares with others."""
    layout, ranks = Layout(config, parallel), range(parallel.num_devices)
    others = tuple(axis for axis in parallel.axis_sizes if axis not in axes)
    ring_of = np.array([layout.place(others, rank) for rank in ranks])
    on_first = set(ring_of[:devices_per_host])
    return len(on_first & set(ring_of[devices_per_host:]))
