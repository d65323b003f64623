"""Reads the arguments of a call: leaves, live rows, padding, and what is checked about them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

Aval = tuple[tuple[int, ...], Any, bool]


class Arguments:
    """Which arguments of a function carry rows, and which may be consumed.

    Attributes:
      rows, donate: argument numbers.
    """

    def __init__(self, label: str, rows: int | Sequence[int], donate: int | Sequence[int]):
        self._label = label
        self.rows, self.donate = _numbers("rows", rows), _numbers("donate", donate)
        if not self.rows:
            raise ValueError("rows is empty: name at least one argument whose leaves have the rows as axis 0")
        if both := sorted(set(self.rows) & set(self.donate)):
            raise ValueError(f"donate = {self.donate}: argument {both[0]} is in rows, whose padded copies are consumed")
        self._known: dict[tuple[Any, tuple[int, ...]], tuple[int, ...]] = {}

    def read(self, args: tuple[Any, ...]) -> tuple[list[Any], Any, int]:
        """(leaves, structure, live rows).

        Raises:
          ValueError: if row arguments disagree, are empty or have no axis 0, or there are too few arguments.
        """
        leaves, tree = jax.tree.flatten(args)
        sizes = set()
        for number in self.row_leaves(tree):
            _refuse_tracer(leaves[number])
            shape = np.shape(leaves[number])
            if not shape:
                raise ValueError(f"rows = {self.rows}: leaf {number} of the arguments is a scalar, without an axis 0")
            sizes.add(shape[0])
        if len(sizes) != 1:
            raise ValueError(f"rows = {self.rows}: their leaves must agree in axis 0, found {sorted(sizes)}")
        live = sizes.pop()
        if live < 1:
            raise ValueError(f"rows = {self.rows}: must have at least one row")
        return leaves, tree, live

    def row_leaves(self, tree: Any) -> tuple[int, ...]:
        """Leaf numbers of the row arguments."""
        return self._leaves(tree, self.rows, "rows")

    def donated_leaves(self, tree: Any) -> tuple[int, ...]:
        """Leaf numbers of the arguments that may be consumed."""
        return self._leaves(tree, self.donate, "donate")

    def padded(self, leaves: list[Any], tree: Any, live: int, rows: int) -> list[Any]:
        """The leaves with row arguments padded with zeros; a JAX array comes to the host for that."""
        if live == rows:
            return list(leaves)
        padded = list(leaves)
        for number in self.row_leaves(tree):
            source = np.asarray(leaves[number])
            # a fresh array each time: a device may read the last call's while this one is filled
            target = np.zeros((rows, *source.shape[1:]), source.dtype)
            target[:live] = source
            padded[number] = target
        return padded

    def _leaves(self, tree: Any, arguments: tuple[int, ...], option: str) -> tuple[int, ...]:
        found = self._known.get((tree, arguments))
        if found is None:
            children = tree.children()
            if arguments and max(arguments) >= len(children):
                raise ValueError(f"{option} = {arguments}: {self._label} was called with {len(children)} arguments")
            ends = np.cumsum([0, *(child.num_leaves for child in children)])
            found = tuple(leaf for a in arguments for leaf in range(int(ends[a]), int(ends[a + 1])))
            self._known[(tree, arguments)] = found
        return found


def aval_of(leaf: Any) -> Aval:
    """(shape, dtype as JAX sees it, whether it is weak) of an array or a number, whose dtype stays its Python type.

    Raises:
      TypeError: for a value of a JAX transformation.
      ValueError: for what is no array and no number.
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        if isinstance(leaf, (bool, int, float, complex)):
            return (), type(leaf), True
        raise ValueError(f"an argument holds {type(leaf).__name__}: must be arrays and numbers")
    if isinstance(leaf, jax.Array):
        _refuse_tracer(leaf)
        return leaf.shape, dtype, leaf.weak_type
    return leaf.shape, jax.dtypes.canonicalize_dtype(dtype), False


def _refuse_tracer(leaf: Any) -> None:
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError(
            "a function of segmented_jit was called inside jax.jit, grad, vmap or another transformation: its "
            "boundaries run on the host, so it must be called with arrays; transform the function itself instead"
        )


def struct_of(aval: Aval) -> jax.ShapeDtypeStruct:
    """What to trace a leaf as."""
    shape, dtype, weak = aval
    if isinstance(dtype, type) and dtype in (bool, int, float, complex):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(shape, dtype, weak_type=weak)


def device_of(leaves: Sequence[Any]) -> jax.Device | None:
    """The one device that committed arrays lie on; None if there are none.

    Raises:
      ValueError: if they lie on several.
    """
    found = set()
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and leaf.committed:
            found |= leaf.devices()
    if len(found) > 1:
        raise ValueError(f"the arguments lie on {len(found)} devices: pass mesh, or put them on one")
    return found.pop() if found else None


def sizes_of(buckets: Sequence[int]) -> tuple[int, ...]:
    """Sorted bucket sizes.

    Raises:
      ValueError: if there is none, or one is no positive integer.
    """
    found = []
    for bucket in buckets:
        try:
            found.append(operator.index(bucket))
        except TypeError:
            raise ValueError(f"buckets = {buckets!r}: must be integers >= 1") from None
    if not found or min(found) < 1:
        raise ValueError(f"buckets = {buckets!r}: must be at least one integer >= 1")
    return tuple(sorted(set(found)))


def _numbers(option: str, given: int | Sequence[int]) -> tuple[int, ...]:
    numbers = (given,) if isinstance(given, int) else tuple(given)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
        raise ValueError(f"{option} = {given!r}: must be argument numbers, integers >= 0")
    return tuple(sorted(set(numbers)))
