"""How every weight and cache is laid out over the ranks: one table, and what follows from it.

A split weight exists as one global array whose axis is the ranks' parts side by side, in the order of the mesh.
What ranks share (K/V heads beyond their number) therefore stands there once a rank, and [gate | up] once a rank too.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping

import numpy as np
from jax.sharding import PartitionSpec

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.parallel.config import AXES, EXPERTS, HEADS, REQUESTS, TOKENS, WIDTH, ParallelConfig, ParallelError
from minimax_jax.tensor_table import MXFP8_BLOCK

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Split:
    """One axis of a tensor, dealt to the ranks along some axes of the mesh.

    Attributes:
      axis: of the tensor.
      over: axes of the mesh.
      heads: the config's count of heads on the axis: with fewer heads than ranks, neighbours share one.
      halves: the axis is [gate | up], and a rank gets its part of both.
    """

    axis: int
    over: tuple[str, ...]
    heads: str | None = None
    halves: bool = False


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensors whose name matches `pattern` (its end, whole parts) are split so; without splits every rank has all.

    Attributes:
      stacked: they are one matrix for each expert.
    """

    pattern: str
    splits: tuple[Split, ...] = ()
    stacked: bool = False

    def turned(self, split: Split) -> Split:
        """The split of the same matrices with their last two axes in each other's place."""
        lead = 1 if self.stacked else 0
        return split if split.axis < lead else dataclasses.replace(split, axis=2 * lead + 1 - split.axis)


RULES = (
    Rule("embed_tokens", (Split(0, TOKENS),)),
    Rule("lm_head", (Split(1, TOKENS),)),
    Rule(r"self_attn\.q_proj", (Split(1, HEADS),)),
    Rule(r"self_attn\.[kv]_proj", (Split(1, HEADS, heads="num_key_value_heads"),)),
    Rule(r"self_attn\.o_proj", (Split(0, HEADS),)),
    Rule(r"self_attn\.index_q_proj", (Split(1, HEADS, heads="index_n_heads"),)),
    Rule(r"self_attn\.index_k_proj"),
    Rule(r"experts\.gate_up_proj", (Split(0, EXPERTS), Split(2, WIDTH, halves=True)), stacked=True),
    Rule(r"experts\.down_proj", (Split(0, EXPERTS), Split(1, WIDTH)), stacked=True),
    Rule(r"(mlp|shared_experts)\.gate_up_proj", (Split(1, TOKENS, halves=True),)),
    Rule(r"(mlp|shared_experts)\.down_proj", (Split(0, TOKENS),)),
    Rule(r"gate\.(weight|e_score_correction_bias)"),
    Rule(r"(\w*norm)\.weight"),
)
KV_CACHE = (Split(0, REQUESTS), Split(1, HEADS, heads="num_key_value_heads"))
INDEX_CACHE = (Split(0, REQUESTS),)
SPLIT_INDEX_CACHE = (Split(0, REQUESTS), Split(1, HEADS))  # the keys of a page, see `key_stripes`


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model's layout over ranks; knows no devices.

    Attributes:
      config: of the whole model.
      parallel: the sizes, which must fit it (`ParallelConfig.check`).
    """

    config: MiniMaxM3Config
    parallel: ParallelConfig

    @property
    def local_config(self) -> MiniMaxM3Config:
        """One rank's sizes, from which its modules and caches are built.

        `num_local_experts` stays the model's, which the router chooses from; experts know theirs by their weights.
        """
        tensor, same = self.parallel.tensor, self.parallel.size(TOKENS)
        return self.config.replace(
            num_attention_heads=self.config.num_attention_heads // tensor,
            num_key_value_heads=max(1, self.config.num_key_value_heads // tensor),
            index_n_heads=max(1, self.config.index_n_heads // tensor),
            vocab_size=self.config.vocab_size // same,
            dense_intermediate_size=self.config.dense_intermediate_size // same,
            shared_intermediate_size=self.config.shared_intermediate_size // same,
            intermediate_size=self.config.intermediate_size // self.parallel.size(WIDTH),
            bos_token_id=None,  # ids of the whole vocabulary
            eos_token_id=None,
        )

    @property
    def experts_per_rank(self) -> int:
        """Routed experts that one rank holds (perhaps only a part of each one's width)."""
        return self.config.num_local_experts // self.parallel.expert

    @property
    def index_cache(self) -> tuple[Split, ...]:
        """How the index caches are split."""
        return SPLIT_INDEX_CACHE if self.parallel.split_index_keys else INDEX_CACHE

    @property
    def index_ranks(self) -> int:
        """Ranks over which the index keys of a data group are split."""
        return self.parallel.tensor if self.parallel.split_index_keys else 1

    def splits(self, name: str, *, columns_first: bool = False) -> tuple[Split, ...]:
        """How a state tensor is split, from `RULES`.

        Args:
          columns_first: of a matrix, or a stack of them, whose last two axes have changed places: an `Mxfp8`'s arrays.

        Raises:
          ValueError: for a name that is in none of them.
        """
        # "experts.…" must not match "shared_experts.…": a rule begins where a part of the name does
        for rule in RULES:
            if re.search(rf"(^|\.){rule.pattern}$", name):
                return tuple(map(rule.turned, rule.splits)) if columns_first else rule.splits
        raise ValueError(f"name = {name!r}: no rule says how this tensor is laid out")

    def spec(self, splits: tuple[Split, ...]) -> PartitionSpec:
        """How a global array is sharded; the same serves `jax.shard_map`."""
        entries: list[tuple[str, ...] | None] = [None] * (1 + max((s.axis for s in splits), default=-1))
        for split in splits:
            entries[split.axis] = split.over
        return PartitionSpec(*entries)

    def local_shape(self, shape: tuple[int, ...], splits: tuple[Split, ...]) -> tuple[int, ...]:
        """One rank's shape of a tensor of the whole model."""
        local = list(shape)
        for split in splits:
            local[split.axis] //= self._parts(split)
        return tuple(local)

    def global_shape(self, shape: tuple[int, ...], splits: tuple[Split, ...]) -> tuple[int, ...]:
        """The shape of the global array, in which what ranks share stands once a rank."""
        whole = list(self.local_shape(shape, splits))
        for split in splits:
            whole[split.axis] *= self.parallel.size(split.over)
        return tuple(whole)

    def ranges(self, shape: tuple[int, ...], splits: tuple[Split, ...], rank: int) -> tuple[tuple[Range, ...], ...]:
        """What a rank holds of a tensor: on each axis the half-open ranges that stand side by side."""
        found: list[tuple[Range, ...]] = [((0, extent),) for extent in shape]
        for split in splits:
            found[split.axis] = self._ranges(split, shape[split.axis], self.place(split.over, rank))
        return tuple(found)

    def check_blocks(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Whether MXFP8 weights can be split so: inputs that share a scale must stay together.

        Args:
          shapes: of the weights in the whole model, [..., in, out], by name.

        Raises:
          ParallelError: if a rank's inputs are no multiple of 32; lists everything.
        """
        found = []
        for name, shape in shapes.items():
            inputs = self.local_shape(shape, self.splits(name))[-2]
            if inputs % MXFP8_BLOCK:
                found.append(f"{name}: {inputs} inputs a rank: must be a multiple of {MXFP8_BLOCK}")
        if found:
            raise ParallelError(
                "MXFP8 weights cannot be spread so (quantization = 'none' multiplies them out):\n  "
                + "\n  ".join(found)
            )

    def take(self, array: np.ndarray, splits: tuple[Split, ...], rank: int) -> np.ndarray:
        """A rank's part of a whole tensor."""
        for axis, parts in enumerate(self.ranges(array.shape, splits, rank)):
            array = np.concatenate([array[(slice(None),) * axis + (slice(*part),)] for part in parts], axis=axis)
        return array

    def whole(self, array: np.ndarray, splits: tuple[Split, ...]) -> np.ndarray:
        """The whole tensor, from its global array."""
        shape = list(array.shape)
        for split in splits:
            shape[split.axis] = shape[split.axis] // self.parallel.size(split.over) * self._parts(split)
        for split in splits:
            ranks = self.parallel.size(split.over)
            pieces = np.split(array, ranks, axis=split.axis)
            out = np.empty([*array.shape[: split.axis], shape[split.axis], *array.shape[split.axis + 1 :]], array.dtype)
            for place, piece in enumerate(pieces):
                start = 0
                for low, high in self._ranges(split, shape[split.axis], place):
                    lead = (slice(None),) * split.axis
                    out[(*lead, slice(low, high))] = piece[(*lead, slice(start, start + high - low))]
                    start += high - low
            array = out
        return array

    def place(self, axes: tuple[str, ...], rank: int) -> int:
        """Where a rank stands along some axes of the mesh."""
        sizes = self.parallel.axis_sizes
        standing = dict(zip(AXES, np.unravel_index(rank, tuple(sizes.values())), strict=True))
        place = 0
        for axis in axes:
            place = place * sizes[axis] + int(standing[axis])
        return place

    def _parts(self, split: Split) -> int:
        """Different parts that the axis is cut into."""
        ranks = self.parallel.size(split.over)
        return ranks if split.heads is None else min(ranks, getattr(self.config, split.heads))

    def _ranges(self, split: Split, extent: int, place: int) -> tuple[Range, ...]:
        parts = self._parts(split)
        part = place * parts // self.parallel.size(split.over)
        pieces = 2 if split.halves else 1
        width, size = extent // pieces, extent // (parts * pieces)
        return tuple((half * width + part * size, half * width + (part + 1) * size) for half in range(pieces))


def boxes(ranges: tuple[tuple[Range, ...], ...]) -> list[tuple[tuple[Range, ...], tuple[slice, ...]]]:
    """The contiguous boxes of a rank's part of a tensor: (ranges in the whole, index into the part)."""
    found = []
    for box in itertools.product(*(enumerate(parts) for parts in ranges)):
        index = []
        for axis, (number, (low, high)) in enumerate(box):
            start = sum(stop - first for first, stop in ranges[axis][:number])
            index.append(slice(start, start + high - low))
        found.append((tuple(part for _, part in box), tuple(index)))
    return found


def part_shape(ranges: tuple[tuple[Range, ...], ...]) -> tuple[int, ...]:
    """The shape of a rank's part."""
    return tuple(sum(high - low for low, high in parts) for parts in ranges)
