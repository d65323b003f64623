"""Where the values of a segmented function live: on one device, or carried per device of a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minimax_jax.segmented.jaxprs import evaluate
from minimax_jax.segmented.split import Segment


class Placement(Protocol):
    """How values are placed, segments lowered, and what boundaries get and give."""

    @property
    def mesh(self) -> Mesh | None:
        """The devices that intermediates are carried over, if there are several."""
        ...

    def key(self, names: Sequence[Any]) -> Hashable:
        """What of the placement of variables decides how a segment is compiled."""
        ...

    def lower(self, segment: Segment, jaxpr: Any, label: str) -> Any:
        """`jax.stages.Lowered` of a segment."""
        ...

    def constant(self, value: Any) -> Any:
        """A closed-over array, where segments expect it."""
        ...

    def value(self, array: Any) -> Any:
        """A NumPy array that a boundary returned, or a literal that one takes (`spread` before), as an intermediate."""
        ...

    def spread(self, array: np.ndarray) -> np.ndarray:
        """One device's value as an intermediate's."""
        ...

    def lift(self, name: Any, value: Any) -> Any:
        """An argument or constant as an intermediate, for a boundary; `name` is None for other values."""
        ...

    def shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """An intermediate's shape, from that on one device."""
        ...

    def finish(self, values: list[Any], names: Sequence[Any]) -> list[Any]:
        """Intermediates as the caller wants the results."""
        ...


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """All values on one device.

    Attributes:
      device: None for JAX's default device.
    """

    device: jax.Device | None
    mesh: Mesh | None = None

    def key(self, names: Sequence[Any]) -> Hashable:
        return self.device

    def lower(self, segment: Segment, jaxpr: Any, label: str) -> Any:
        def run(*args: Any) -> list[Any]:
            return evaluate(jaxpr, args)

        run.__name__ = run.__qualname__ = label  # profiles show it
        sharding = None if self.device is None else jax.sharding.SingleDeviceSharding(self.device)
        avals: list[Any] = [var.aval for var in segment.invars]
        inputs = [jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding) for aval in avals]
        return jax.jit(run, donate_argnums=given_away(segment)).lower(*inputs)

    def constant(self, value: Any) -> Any:
        return jax.device_put(value, self.device)

    def value(self, array: Any) -> Any:
        return jax.device_put(array, self.device, may_alias=False)

    def spread(self, array: np.ndarray) -> np.ndarray:
        return array

    def lift(self, name: Any, value: Any) -> Any:
        return value

    def shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        return local

    def finish(self, values: list[Any], names: Sequence[Any]) -> list[Any]:
        return values


class OnMesh:
    """The function is one device's body; every intermediate is carried as [devices, *local shape].

    Device i of the mesh holds slice i, so carrying relabels and moves nothing. Arguments keep their own sharding.

    """

    def __init__(
        self,
        mesh: Mesh,
        arguments: Sequence[Any],
        specs: Sequence[PartitionSpec],
        constants: Sequence[Any],
        out_specs: Sequence[PartitionSpec],
    ):
        """
        Args:
          mesh: the devices.
          arguments, specs: the traced function's inputs and how they are sharded.
          constants: its constants, which every device has.
          out_specs: how its results shall be sharded.
        """
        self._mesh = mesh
        self._specs = dict(zip(arguments, specs, strict=True)) | {var: PartitionSpec() for var in constants}
        self._out_specs = tuple(out_specs)
        self._carried = PartitionSpec(tuple(mesh.axis_names))
        self._finish: Any = None
        self._lifts: dict[PartitionSpec, Any] = {}

    @property
    def mesh(self) -> Mesh | None:
        return self._mesh

    def key(self, names: Sequence[Any]) -> Hashable:
        return (self._mesh, tuple(str(self._specs.get(name, "carried")) for name in names))

    def lower(self, segment: Segment, jaxpr: Any, label: str) -> Any:
        carried = [var not in self._specs for var in segment.invars]

        def body(*args: Any) -> list[Any]:
            local = [x[0] if lifted else x for x, lifted in zip(args, carried, strict=True)]
            return [x[None] for x in evaluate(jaxpr, local)]

        body.__name__ = body.__qualname__ = label
        specs = [self._specs.get(var, self._carried) for var in segment.invars]
        run = self._shard(body, tuple(specs), [self._carried] * len(segment.outvars))
        inputs = []
        for var, spec in zip(segment.invars, specs, strict=True):
            aval: Any = var.aval
            shape = self.shape(aval.shape) if var not in self._specs else self.whole_shape(aval.shape, spec)
            inputs.append(jax.ShapeDtypeStruct(shape, aval.dtype, sharding=NamedSharding(self._mesh, spec)))
        return jax.jit(run, donate_argnums=given_away(segment)).lower(*inputs)

    def constant(self, value: Any) -> Any:
        return jax.device_put(value, NamedSharding(self._mesh, PartitionSpec()))

    def value(self, array: Any) -> Any:
        return jax.device_put(array, NamedSharding(self._mesh, self._carried), may_alias=False)

    def spread(self, array: np.ndarray) -> np.ndarray:
        return np.broadcast_to(array, self.shape(array.shape))

    def lift(self, name: Any, value: Any) -> Any:
        if name not in self._specs:
            return value
        spec = self._specs[name]
        if spec not in self._lifts:
            self._lifts[spec] = jax.jit(self._shard(lambda x: x[None], (spec,), self._carried))
        return self._lifts[spec](value)

    def shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        return (self._mesh.size, *local)

    def whole_shape(self, local: tuple[int, ...], spec: PartitionSpec) -> tuple[int, ...]:
        """The global shape of an argument."""
        sizes = [_axis_size(self._mesh, entry) for entry in (*spec, *(None,) * (len(local) - len(spec)))]
        return tuple(extent * size for extent, size in zip(local, sizes, strict=True))

    def finish(self, values: list[Any], names: Sequence[Any]) -> list[Any]:
        if self._finish is None:
            specs = tuple(self._specs.get(name, self._carried) for name in names)
            carried = [name not in self._specs for name in names]

            def body(*args: Any) -> list[Any]:
                return [x[0] if lifted else x for x, lifted in zip(args, carried, strict=True)]

            self._finish = jax.jit(self._shard(body, specs, list(self._out_specs)))
        return self._finish(*values)

    def _shard(self, body: Any, in_specs: Any, out_specs: Any) -> Any:
        # replication is not checked: a body that was traced before holds no marks of it
        return jax.shard_map(body, mesh=self._mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def given_away(segment: Segment) -> tuple[int, ...]:
    """Numbers of the inputs that a segment consumes."""
    return tuple(number for number, given in enumerate(segment.donated) if given)


def local_shape(mesh: Mesh, shape: tuple[int, ...], spec: PartitionSpec) -> tuple[int, ...]:
    """One device's part of an argument.

    Raises:
      ValueError: if a mesh axis does not divide it.
    """
    if len(spec) > len(shape):
        raise ValueError(f"in_specs has {spec} for an argument of shape {shape}: it must have at most its axes")
    local = list(shape)
    for axis, entry in enumerate(spec):
        size = _axis_size(mesh, entry)
        if local[axis] % size:
            raise ValueError(f"in_specs has {spec} for an argument of shape {shape}: axis {axis} must divide by {size}")
        local[axis] //= size
    return tuple(local)


def spread_specs(name: str, specs: Any, tree: Any) -> list[PartitionSpec]:
    """One spec a leaf, from a prefix of the leaves' structure.

    Raises:
      ValueError: if it is no such prefix.
    """
    leaves = jax.tree.unflatten(tree, [0] * tree.num_leaves)
    found: list[PartitionSpec] = []

    def take(spec: Any, below: Any) -> None:
        if not isinstance(spec, PartitionSpec):
            raise ValueError(f"{name} holds {type(spec).__name__}: must be jax.sharding.PartitionSpec")
        found.extend([spec] * len(jax.tree.leaves(below)))

    jax.tree.map(take, specs, leaves, is_leaf=lambda x: isinstance(x, PartitionSpec))
    return found


def _axis_size(mesh: Mesh, entry: Any) -> int:
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return math.prod(mesh.shape[name] for name in names)
