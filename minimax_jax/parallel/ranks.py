"""A model's layout on a mesh of devices: global arrays from parts and back, and functions of one rank."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from minimax_jax.cache import CachePlacement, PagedCaches
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.mxfp8_parts import for_kernels, values_in_rows
from minimax_jax.parallel.comm import MeshComm
from minimax_jax.parallel.config import AXES, HEADS, REQUESTS, TOKENS, ParallelConfig
from minimax_jax.parallel.index_split import IndexSplit
from minimax_jax.parallel.layout import KV_CACHE, Layout, Range, boxes, part_shape
from minimax_jax.parallel.mesh import make_mesh
from minimax_kernels import Mxfp8
from minimax_kernels.mxfp8 import straighten


class Ranks:
    """The ranks that one model runs on.

    Attributes:
      layout: who holds what.
      mesh: the devices; rank r is the r-th of them.
      comm: what model modules get inside `per_rank` functions.
      index_split: what shares out index keys, None if every rank of a data group has them all.
      groups: data ranks, each with requests and pages of its own.
      rows: how arrays with the data ranks' rows one after the other are sharded.
      columns: how [T, data ranks] is sharded, a column for each data rank.
      carried: how [ranks, ...] is sharded, with what each rank has of its own.
      logits: how rows of logits are sharded that each rank keeps its part of the vocabulary of.
    """

    def __init__(self, config: MiniMaxM3Config, parallel: ParallelConfig, devices: Sequence[jax.Device] | None = None):
        """
        Args:
          devices: the first ones are used; None for all of JAX's.

        Raises:
          ParallelError: if the model cannot be spread so; nothing was loaded.
        """
        parallel.check(config, len(jax.devices() if devices is None else devices))
        self.layout = Layout(config, parallel)
        self.mesh = make_mesh(parallel, devices)
        self.comm = MeshComm(parallel, self.layout.experts_per_rank)
        self.index_split = _index_split(config, parallel)
        self.groups = parallel.attention_data
        self.rows, self.columns = PartitionSpec(REQUESTS), PartitionSpec(None, REQUESTS)
        self.carried = PartitionSpec(AXES)
        self.logits = PartitionSpec(REQUESTS, TOKENS)

    def global_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the global array of a weight that has `shape` in the whole model."""
        return self.layout.global_shape(shape, self.layout.splits(name))

    def weight_specs(self, names: Sequence[str], quantized: Collection[str] = ()) -> list[PartitionSpec]:
        """How weights are sharded, for `per_rank`.

        Args:
          quantized: which of them are `Mxfp8`, whose scales are sharded as their values.
        """
        return [self.layout.spec(self.layout.splits(name, columns_first=name in quantized)) for name in names]

    @property
    def cache_specs(self) -> PagedCaches:
        """How caches are sharded, for `per_rank`."""
        kv: Any = self.layout.spec(KV_CACHE)
        index: Any = self.layout.spec(self.layout.index_cache)
        return PagedCaches(kv, kv, index)

    @property
    def cache_placement(self) -> CachePlacement:
        """What `PagePool` needs: every data rank has its own pages, ranks that share a head each have it."""
        return CachePlacement(
            kv=NamedSharding(self.mesh, self.layout.spec(KV_CACHE)),
            index=NamedSharding(self.mesh, self.layout.spec(self.layout.index_cache)),
            kv_heads=self.layout.local_config.num_key_value_heads * self.layout.parallel.size(HEADS),
            groups=self.groups,
        )

    def assemble(
        self,
        name: str,
        shape: tuple[int, ...],
        read: Callable[[tuple[Range, ...]], np.ndarray],
        *,
        columns_first: bool = False,
    ) -> jax.Array:
        """The global array of a weight, made from what this process's devices need of it and no more.

        The host holds the parts of two ranks at most, one of which is being read; ranks that hold the same share one.

        Args:
          shape: in the whole model.
          read: gives half-open ranges of the whole, one per axis.
          columns_first: whether it is one of an `Mxfp8`'s arrays.
        """
        splits = self.layout.splits(name, columns_first=columns_first)
        sharding = NamedSharding(self.mesh, self.layout.spec(splits))
        ranks: dict[tuple[tuple[Range, ...], ...], list[jax.Device]] = {}
        for rank, device in enumerate(self.mesh.devices.flat):
            if device.process_index == jax.process_index():
                ranks.setdefault(self.layout.ranges(shape, splits, rank), []).append(device)
        shards: list[jax.Array] = []
        for ranges, devices in ranks.items():
            pieces = boxes(ranges)
            if len(pieces) == 1:
                part = read(pieces[0][0])
            else:
                first = read(pieces[0][0])
                part = np.empty(part_shape(ranges), first.dtype)
                part[pieces[0][1]] = first
                for box, index in pieces[1:]:
                    part[index] = read(box)
            shards += [jax.device_put(part, device, may_alias=False) for device in devices]
            jax.block_until_ready(shards)  # so that no more than this one is left when the next has come
        return jax.make_array_from_single_device_arrays(self.layout.global_shape(shape, splits), sharding, shards)

    def put(self, name: str, whole: Any) -> Any:
        """The global array of a weight that lies on the host, or on one device; of an `Mxfp8` both arrays.

        Raises:
          ParallelError: if ranks would share a block of inputs with one scale.
        """
        quantized = isinstance(whole, Mxfp8)
        if quantized:
            self.layout.check_blocks({name: whole.shape})

        def spread(array: np.ndarray | jax.Array) -> jax.Array:
            host = np.asarray(array)

            def read(ranges: tuple[Range, ...]) -> np.ndarray:
                # a copy, for on a CPU JAX may use the memory that it is given, which the caller may write to
                return host[tuple(slice(*part) for part in ranges)].copy()

            return self.assemble(name, host.shape, read, columns_first=quantized)

        if quantized:
            return for_kernels(spread(straighten(np.asarray(whole.values))), spread(whole.scales))
        return spread(whole)

    def whole(self, name: str, weight: Any) -> Any:
        """The whole weight on the host; of an `Mxfp8` both arrays."""
        splits = self.layout.splits(name, columns_first=isinstance(weight, Mxfp8))

        def gathered(array: jax.Array) -> np.ndarray:
            return self.layout.whole(np.asarray(array), splits)

        if isinstance(weight, Mxfp8):  # each part is in the order of its own inputs
            return Mxfp8.from_rows(gathered(values_in_rows(weight)), gathered(weight.scales))
        return gathered(weight)

    def place(self, values: Any, specs: Any) -> Any:
        """What a step takes, from arrays that every process has, on the devices; one spec a leaf."""
        return jax.tree.map(self._placed, values, specs)

    def _placed(self, value: np.ndarray | jax.Array, spec: PartitionSpec) -> jax.Array:
        sharding = NamedSharding(self.mesh, spec)
        host = np.asarray(value)  # by callback, as device_put would ask every other process whether it has the same
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def fetch(self, rows: jax.Array) -> np.ndarray:
        """Rows of all data ranks, on the host of every process."""
        if not rows.is_fully_addressable:
            rows = self._replicate(rows)
        return np.asarray(rows)

    @functools.cached_property
    def _replicate(self) -> Callable[[jax.Array], jax.Array]:
        return jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def per_rank(self, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`fn` as the body of one rank; `comm` works in it.

        Results that all ranks share are taken from one of them, unchecked: ranks agree because `comm` gave them the
        same numbers.
        """
        return jax.shard_map(fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _index_split(config: MiniMaxM3Config, parallel: ParallelConfig) -> IndexSplit | None:
    axes = tuple(axis for axis in HEADS if parallel.axis_sizes[axis] > 1)
    if not parallel.split_index_keys or not axes:
        return None
    return IndexSplit(axes, parallel.tensor, config.index_n_heads)
