"""Cuts a traced function at its boundaries into segments, by liveness."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

from minimax_jax.segmented.boundary import Boundary, boundary_p, consumed_leaves, describe, get_boundary
from minimax_jax.segmented.errors import UnknownBoundaryError
from minimax_jax.segmented.jaxprs import Atom, Traced, is_literal


@dataclasses.dataclass(frozen=True)
class Segment:
    """Equations between two boundaries.

    Attributes:
      index: counts the segments of a split.
      invars: what it reads from outside; outvars: what later steps or the caller read.
      donated: for each of invars, whether its buffer may become that of a result: nobody reads it afterwards.
      frees: of invars, those that nobody reads afterwards.
    """

    index: int
    eqns: tuple[jex.JaxprEqn, ...]
    invars: tuple[jex.Var, ...]
    outvars: tuple[jex.Var, ...]
    donated: tuple[bool, ...]
    frees: tuple[jex.Var, ...]


@dataclasses.dataclass(frozen=True)
class Crossing:
    """One call of a boundary's host function.

    Attributes:
      index: counts the crossings of a split.
      after: number of the last segment before it; -1 at the function's start.
      label: name and static values, for messages.
      operands: variables or literals; outvars: its results.
      consumed: numbers of operands (leaves) that the boundary consumes.
      copied: of these, the ones that somebody still needs: it gets copies.
      frees: variables that nobody reads afterwards.
      registered: the boundary as it was then.
    """

    index: int
    after: int
    label: str
    params: dict[str, Any]
    operands: tuple[Atom, ...]
    outvars: tuple[jex.Var, ...]
    consumed: frozenset[int]
    copied: frozenset[int]
    frees: tuple[jex.Var, ...]
    registered: Boundary


@dataclasses.dataclass(frozen=True)
class Split:
    """A function as steps that run in order."""

    traced: Traced
    steps: tuple[Segment | Crossing, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The steps that are compiled."""
        return tuple(step for step in self.steps if isinstance(step, Segment))

    @property
    def crossings(self) -> tuple[Crossing, ...]:
        """The steps that run on the host."""
        return tuple(step for step in self.steps if isinstance(step, Crossing))


def split(traced: Traced, boundaries: frozenset[str], donated: Sequence[bool]) -> Split:
    """Splits at the boundaries named.

    Args:
      donated: for each argument, whether its buffer may be consumed.

    Raises:
      UnknownBoundaryError: if a name is not registered.
    """
    groups = _groups(_live_equations(traced), boundaries)
    reads = [dict.fromkeys(_read(group)) for group in groups]
    last_read: dict[Any, int] = {}
    for number, names in enumerate(reads):
        last_read.update(dict.fromkeys(names, number))
    last_read.update({atom: len(groups) for atom in traced.outvars if not is_literal(atom)})

    owned = {var for var, given in zip(traced.invars, donated, strict=True) if given}
    steps: list[Segment | Crossing] = []
    segments = crossings = 0
    for number, (group, names) in enumerate(zip(groups, reads, strict=True)):
        frees = tuple(var for var in names if last_read[var] == number)
        if isinstance(group, list):
            outvars = [var for eqn in group for var in eqn.outvars if last_read.get(var, -1) > number]
            gives = _aliases(list(names), outvars, owned & set(frees))
            steps.append(Segment(segments, tuple(group), tuple(names), tuple(outvars), gives, frees))
            segments += 1
            owned.update(outvars)
        else:
            registered = _registered(group, segments - 1)
            consumed = consumed_leaves(registered, group.params["in_tree"])
            copied = _copies(group, consumed, set(frees) & owned)
            label = describe(group.params["name"], group.params["static"])
            steps.append(
                Crossing(
                    crossings,
                    segments - 1,
                    label,
                    dict(group.params),
                    tuple(group.invars),
                    tuple(group.outvars),
                    consumed,
                    copied,
                    frees,
                    registered,
                )
            )
            crossings += 1
            owned.update(group.outvars)
    return Split(traced, tuple(steps))


def _live_equations(traced: Traced) -> list[jex.JaxprEqn]:
    """Without those that nothing depends on; boundaries and other effects stay."""
    needed = {atom for atom in traced.outvars if not is_literal(atom)}
    kept = []
    for eqn in reversed(traced.eqns):
        if eqn.effects or any(var in needed for var in eqn.outvars):
            kept.append(eqn)
            needed.update(atom for atom in eqn.invars if not is_literal(atom))
    return kept[::-1]


def _groups(eqns: list[jex.JaxprEqn], boundaries: frozenset[str]) -> list[list[jex.JaxprEqn] | jex.JaxprEqn]:
    """Runs of equations (lists) and boundaries (lone equations), in order."""
    groups: list[list[jex.JaxprEqn] | jex.JaxprEqn] = []
    for eqn in eqns:
        if eqn.primitive is boundary_p and eqn.params["name"] in boundaries:
            groups.append(eqn)
        elif groups and isinstance(groups[-1], list):
            groups[-1].append(eqn)
        else:
            groups.append([eqn])
    return groups


def _read(group: list[jex.JaxprEqn] | jex.JaxprEqn) -> list[jex.Var]:
    """Variables that a group reads and does not define, in the order of their first use."""
    inside: set[Any] = set()
    found: list[Any] = []
    for eqn in group if isinstance(group, list) else [group]:
        found += [atom for atom in eqn.invars if not is_literal(atom) and atom not in inside]
        inside.update(eqn.outvars)
    return found


def _aliases(invars: list[jex.Var], outvars: list[jex.Var], dead: set[jex.Var]) -> tuple[bool, ...]:
    """Which inputs to donate: dead ones for which a result of the same shape and dtype is left."""
    room = collections.Counter(_kind(var) for var in outvars)
    donated = []
    for var in invars:
        kind = _kind(var)
        gives = var in dead and room[kind] > 0
        room[kind] -= gives
        donated.append(gives)
    return tuple(donated)


def _kind(var: Any) -> tuple[Any, Any]:
    return var.aval.shape, var.aval.dtype


def _registered(eqn: jex.JaxprEqn, after: int) -> Boundary:
    found = get_boundary(eqn.params["name"])
    if found is None:
        where = "at the function's start" if after < 0 else f"after segment {after}"
        raise UnknownBoundaryError(
            f"boundary {describe(eqn.params['name'], eqn.params['static'])} {where}: no boundary of this name is "
            "registered"
        )
    return found


def _copies(eqn: jex.JaxprEqn, consumed: frozenset[int], dead: set[jex.Var]) -> frozenset[int]:
    uses = collections.Counter(atom for atom in eqn.invars if not is_literal(atom))
    return frozenset(
        number for number in consumed if is_literal(atom := eqn.invars[number]) or atom not in dead or uses[atom] > 1
    )
