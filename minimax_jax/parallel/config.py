"""How a model is spread over devices: the sizes a user chooses, and what follows from them."""

from __future__ import annotations

import dataclasses

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.integers import integer_within

TENSOR_SIZES = (1, 2, 4, 8)

HOST, DATA, REPLICA, OUTER, INNER = AXES = ("host", "data", "replica", "outer", "inner")
# Groups with requests of their own (data ranks); ranks that share a request's heads; ranks that hold the same tokens;
# ranks that experts are dealt to; ranks that split each of their experts. Every one is a run of the mesh's axes, so one
# mesh serves attention and experts.
REQUESTS, HEADS, TOKENS = (HOST, DATA), (OUTER, INNER), (REPLICA, OUTER, INNER)
EXPERTS, WIDTH = (HOST, DATA, REPLICA, OUTER), (INNER,)


class ParallelError(ValueError):
    """Sizes that cannot be: each line names one, its value and what is allowed."""


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the three ways to spread a model, over the same devices.

    `attention_data` groups of `tensor` ranks attend, each group its own requests. `expert` ranks hold different
    experts. Where there are fewer expert ranks than devices, the rest split each expert; where there are more than
    attention ranks, these are replicated.

    Attributes:
      tensor: ranks that share heads, vocabulary and MLP widths; 1, 2, 4 or 8.
      expert: ranks that routed experts are dealt to.
      attention_data: groups of ranks with requests of their own.
      split_index_keys: whether ranks that share heads also share out the index keys, each scoring its part for all
        heads; without it each has and scores all of them. Tokens are the same. Off by default: it costs two small
        exchanges in each sparse layer, which long contexts win back and short ones do not.
      hosts: among which the `attention_data` groups are dealt, so that tokens go between hosts once, then to the ranks
        of a host over its own links. JAX's devices must be in the order of the hosts, as many on each. 1 does not tell
        hosts apart. Tokens are the same but for rounding.
      all_to_all_tokens: steps of so many tokens or more, those of all groups and padding included, send each token
        to the ranks of its experts only, others to all ranks. None for never.

    Raises:
      ParallelError: on construction, if the sizes do not fit each other; lists everything.
    """

    tensor: int = 1
    expert: int = 1
    attention_data: int = 1
    split_index_keys: bool = False
    hosts: int = 1
    all_to_all_tokens: int | None = None

    def __post_init__(self) -> None:
        found = []
        for key in ("tensor", "expert", "attention_data", "hosts", "all_to_all_tokens"):
            value = getattr(self, key)
            if value is None and key == "all_to_all_tokens":
                continue
            if (number := integer_within(value, 1)) is None:
                found.append(f"{key} = {value!r}: must be an integer >= 1")
                continue
            object.__setattr__(self, key, number)
            if key == "tensor" and number not in TENSOR_SIZES:
                found.append(f"tensor = {number}: must be one of {', '.join(map(str, TENSOR_SIZES))}")
        if not found and self.expert % self.attention_data:
            found.append(f"expert = {self.expert}: must be a multiple of attention_data = {self.attention_data}")
        if not found and self.attention_data % self.hosts:
            found.append(f"hosts = {self.hosts}: must divide attention_data = {self.attention_data}")
        split: object = self.split_index_keys
        if not isinstance(split, bool):
            found.append(f"split_index_keys = {split!r}: must be True or False")
        attention = self.tensor * self.attention_data if not found else 1
        if not found and self.expert % attention and attention % self.expert:
            found.append(
                f"expert = {self.expert}: must be a divisor or a multiple of tensor * attention_data = {attention}"
            )
        _raise_if(found)

    @property
    def num_devices(self) -> int:
        """Devices that take part."""
        return max(self.tensor * self.attention_data, self.expert)

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Sizes of the mesh's axes, by name and in order; rank r is place r in row-major order."""
        replicas = self.num_devices // (self.tensor * self.attention_data)
        inner = self.num_devices // self.expert
        data = self.attention_data // self.hosts
        return dict(zip(AXES, (self.hosts, data, replicas, self.tensor // inner, inner), strict=True))

    def size(self, axes: tuple[str, ...]) -> int:
        """Ranks along some axes together."""
        sizes, count = self.axis_sizes, 1
        for axis in axes:
            count *= sizes[axis]
        return count

    def real(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the axes that have more than one rank: over the others nothing need be said."""
        return tuple(axis for axis in axes if self.axis_sizes[axis] > 1)

    def check(self, config: MiniMaxM3Config, num_devices: int) -> None:
        """Whether a model can be spread so; to be asked before anything loads.

        Raises:
          ParallelError: if there are too few devices, or a size does not divide what it splits; lists everything.
        """
        found = []
        if self.num_devices > num_devices:
            found.append(
                f"tensor = {self.tensor}, expert = {self.expert}, attention_data = {self.attention_data}: need "
                f"{self.num_devices} devices, must be at most {num_devices}, the ones there are"
            )
        for key in ("num_key_value_heads", "index_n_heads"):
            heads = getattr(config, key)
            if heads % self.tensor and self.tensor % heads:
                found.append(f"tensor = {self.tensor}: must be a divisor or a multiple of {key} = {heads}")
        split = ("num_attention_heads", *(("index_block_size",) if self.split_index_keys else ()))
        found += _dividing(config, "tensor", self.tensor, split)
        found += _dividing(config, "expert", self.expert, ("num_local_experts",))
        shared = ("vocab_size", "dense_intermediate_size", "shared_intermediate_size")
        found += _dividing(config, f"ranks with the same tokens ({' * '.join(TOKENS)})", self.size(TOKENS), shared)
        found += _dividing(config, "ranks to an expert", self.size(WIDTH), ("intermediate_size",))
        if self.hosts > 1:
            found += _dividing(config, "ranks with the same tokens", self.size(TOKENS), ("hidden_size",))
        _raise_if(found)


def _dividing(config: MiniMaxM3Config, name: str, size: int, keys: tuple[str, ...]) -> list[str]:
    split = {key: getattr(config, key) for key in keys}
    return [f"{name} = {size}: must divide {key} = {value}" for key, value in split.items() if value % size]


def _raise_if(found: list[str]) -> None:
    if found:
        raise ParallelError("impossible parallel layout:\n  " + "\n  ".join(found))
