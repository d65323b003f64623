"""One bucket of a function: its split, executables and captures, and the loop that runs them."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from minimax_jax.segmented.arguments import Aval, aval_of
from minimax_jax.segmented.boundary import BoundaryCall, call_host, get_boundary
from minimax_jax.segmented.epoch import Epoch
from minimax_jax.segmented.errors import BoundaryError, StaleCaptureError
from minimax_jax.segmented.executables import Executable
from minimax_jax.segmented.jaxprs import is_literal
from minimax_jax.segmented.placement import Placement
from minimax_jax.segmented.runner import Capture, Entry, Record, Runner, addresses_of
from minimax_jax.segmented.split import Crossing, Segment, Split


@dataclasses.dataclass(frozen=True)
class Signature:
    """What a program was traced for.

    Attributes:
      rows: the padded number of rows.
      tree: structure of the arguments.
      avals: (shape, dtype, whether weak) of every leaf.
    """

    rows: int
    tree: Any
    avals: tuple[Aval, ...]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a program.

    Attributes:
      values: the leaves, padded.
      live: rows that hold data.
      runtime: for the boundaries.
      epoch, life: of the runtime's resources, as they were when the call began.
      size: whether the rows are a bucket's, as boundaries are told.
    """

    values: list[Any]
    live: int
    runtime: Any
    epoch: Epoch | None
    life: int
    size: Literal["bucket", "exact"] = "bucket"


@dataclasses.dataclass
class HostTime:
    """Seconds that the host spent in calls of a program: all of it, and inside boundaries."""

    total: float = 0.0
    boundaries: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Recording:
    """What a capturing call collects; `fixed` are the numbers of the leaves that it holds."""

    fixed: set[int]
    leaves: tuple[Any, ...]
    captures: list[Capture] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Compute:
    segment: Segment
    inputs: tuple[int, ...]
    results: tuple[int, ...]
    frees: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Cross:
    crossing: Crossing
    params: dict[str, Any]  # of its equation, results as they are placed
    operands: tuple[Any, ...]  # a slot, or the array of a literal
    names: tuple[Any, ...]  # their variables, None for literals
    results: tuple[int, ...]
    frees: tuple[int, ...]


class Program:
    """Runs a split function on values in slots: arguments first, then constants, then intermediates.

    Attributes:
      signature: what it was traced for; the key of its entries in the runners.
      out_tree: structure of the results.
      captured_leaves: numbers of the leaves that captures hold on to (weights); a leaf that changes from call to
        call is taken out at its first change.
    """

    def __init__(
        self,
        signature: Signature,
        split: Split,
        executables: Sequence[Executable],
        runners: Sequence[Runner],
        captured_leaves: set[int],
        placement: Placement,
        out_tree: Any,
    ):
        self.signature = signature
        self.out_tree = out_tree
        self.split = split
        self.num_crossings = len(split.crossings)
        self.entries = [Entry(executable) for executable in executables]
        # a function of nothing but boundaries is warmed up, captured and cleared like others
        self._records: list[Record] = [*self.entries] or [Record()]
        self.runners = list(runners)
        for runner, record in zip(self.runners, self._records, strict=True):
            runner.entries[signature] = record
        self.captured_leaves = captured_leaves
        self._placement = placement
        slots: dict[Any, int] = {}
        for var in (*split.traced.invars, *split.traced.constvars):
            slots[var] = len(slots)
        self._fixed_slots = range(len(split.traced.invars), len(slots))
        self._consts = [placement.constant(const) for const in split.traced.consts]
        for step in split.steps:
            for var in step.outvars:
                slots.setdefault(var, len(slots))
        self._num_slots = len(slots)
        self._steps = [self._step(step, slots) for step in split.steps]
        self._outputs = [self._source(atom, slots) for atom in split.traced.outvars]
        # no result may be the caller's argument, what this program keeps, or another result: it may be donated later
        made = {slot for step in self._steps for slot in step.results}
        self._copied_outputs = [
            source not in made or source in self._outputs[:number] if isinstance(source, int) else True
            for number, source in enumerate(self._outputs)
        ]
        self._output_names = [None if is_literal(atom) else atom for atom in split.traced.outvars]
        self._held: tuple[Any, ...] = ()  # leaves as they were captured last

    def _step(self, step: Segment | Crossing, slots: dict[Any, int]) -> _Compute | _Cross:
        results = tuple(slots[var] for var in step.outvars)
        frees = tuple(slots[var] for var in step.frees)
        if isinstance(step, Segment):
            return _Compute(step, tuple(slots[var] for var in step.invars), results, frees)
        shapes = tuple((self._placement.shape(shape), dtype) for shape, dtype in step.params["results"])
        operands = tuple(self._source(atom, slots) for atom in step.operands)
        names = tuple(None if is_literal(atom) else atom for atom in step.operands)
        return _Cross(step, {**step.params, "results": shapes}, operands, names, results, frees)

    def _source(self, atom: Any, slots: dict[Any, int]) -> Any:
        if is_literal(atom):
            return self._placement.value(self._placement.spread(np.asarray(atom.val, atom.aval.dtype)))
        return slots[atom]

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether leaves are those that were captured, or have the traced shapes and dtypes."""
        held, expected = self._held, self.signature.avals
        if len(held) != len(leaves):
            return tuple(aval_of(leaf) for leaf in leaves) == expected
        return all(
            leaf is known or aval_of(leaf) == aval for leaf, known, aval in zip(leaves, held, expected, strict=True)
        )

    def is_warm(self, warmups: int) -> bool:
        """Whether it ran eagerly that often since it was cleared."""
        return all(record.warmups >= warmups for record in self._records)

    @property
    def is_captured(self) -> bool:
        """Whether all of it is captured, for whatever call."""
        return all(record.capture is not None for record in self._records)

    def captured(self, call: Call) -> list[Capture] | None:
        """The captures that serve this call; None if it must run without them.

        Raises:
          StaleCaptureError: if they belong to an earlier life of the call's resources.
        """
        captures = [record.capture for record in self._records]
        if any(capture is None or not capture.belongs_to(call.epoch) for capture in captures):
            return None
        found = [capture for capture in captures if capture is not None]
        if call.epoch is not None:
            call.epoch.check(found[0].life, f"the capture of {self.signature.rows} rows")
        leaves = found[0].leaves
        if any(capture.leaves is not leaves for capture in found):
            return None  # another thread is just capturing
        changed = {n for n, held in enumerate(leaves) if held is not None and call.values[n] is not held}
        if changed:
            self.captured_leaves = self.captured_leaves - changed
            return None
        return found

    def replay(self, call: Call, captures: list[Capture], spent: HostTime) -> list[Any]:
        """Runs captured segments; raises `StaleCaptureError` if the resources are replaced meanwhile."""
        return self._run(call, captures, None, spent)

    def eager(self, call: Call, spent: HostTime) -> list[Any]:
        """Runs the same executables and remembers nothing but that it warmed up."""
        results = self._run(call, None, None, spent)
        for record in self._records:
            record.warmups += 1
        return results

    def capture(self, call: Call, spent: HostTime) -> list[Any]:
        """Runs eagerly and, if all went well, captures every segment."""
        fixed = self.captured_leaves
        found = _Recording(fixed, tuple(x if n in fixed else None for n, x in enumerate(call.values)))
        results = self._run(call, None, found, spent)
        if not self.entries:
            found.captures.append(Capture((), (), {}, (), (), found.leaves, _weak(call.epoch), call.life))
        if call.epoch is not None:
            call.epoch.watch(self)
            for runner in self.runners:
                call.epoch.watch(runner)
        self._held = found.leaves
        for record, capture in zip(self._records, found.captures, strict=True):
            record.capture = capture
        if call.epoch is not None and call.epoch.value != call.life:
            for record in self._records:  # replaced meanwhile, maybe before the watch began: keep nothing
                record.clear()
            call.epoch.check(call.life, "this capture")
        return results

    def clear(self) -> None:
        """Drops the captured leaves."""
        self._held = ()

    def replaced(self, call: Call) -> list[Any]:
        """Captured leaves in whose place the call brings others."""
        held = self._held
        return [old for old, new in zip(held, call.values, strict=False) if old is not None and old is not new]

    def let_go(self, leaves: set[int]) -> None:
        """Drops the captures if they hold one of these leaves (by id); they are taken anew at the next call."""
        if any(id(leaf) in leaves for leaf in self._held if leaf is not None):
            self._held = ()
            for record in self._records:
                record.capture = None

    def _run(self, call: Call, captures: list[Capture] | None, found: _Recording | None, spent: HostTime) -> list[Any]:
        start = time.perf_counter()
        values = call.values + self._consts
        values += [None] * (self._num_slots - len(values))
        for step in self._steps:
            if call.epoch is not None:
                call.epoch.check(call.life, "this call")
            if isinstance(step, _Compute):
                self._compute(step, call, values, captures, found)
            else:
                began = time.perf_counter()
                self._cross(step, call, values)
                spent.boundaries += time.perf_counter() - began
        results = [values[source] if isinstance(source, int) else source for source in self._outputs]
        results = [
            jax.numpy.array(result, copy=True) if copied else result
            for result, copied in zip(results, self._copied_outputs, strict=True)
        ]
        results = self._placement.finish(results, self._output_names)
        spent.total += time.perf_counter() - start
        return results

    def _compute(
        self,
        step: _Compute,
        call: Call,
        values: list[Any],
        captures: list[Capture] | None,
        found: _Recording | None,
    ) -> None:
        index = step.segment.index
        if captures is None:
            args = [values[slot] for slot in step.inputs]
        else:
            capture = captures[index]
            args = list(capture.arguments)
            for position, slot in capture.moving:
                args[position] = values[slot]
        if found is not None:
            held = self._captured_arguments(step, values, found.fixed)
            addresses = addresses_of(held)
        try:
            results = self.entries[index].executable.compiled(*args)
        except Exception as error:
            error.add_note(f"in segment {index} of {self.signature.rows} rows")
            raise
        for slot in step.frees:
            values[slot] = None
        for slot, result in zip(step.results, results, strict=True):
            values[slot] = result
        if found is not None:
            moving = tuple((n, slot) for n, slot in enumerate(step.inputs) if held[n] is None)
            outputs = tuple(jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results)
            places = tuple(addresses_of(results).values())
            found.captures.append(
                Capture(tuple(held), moving, addresses, outputs, places, found.leaves, _weak(call.epoch), call.life)
            )

    def _captured_arguments(self, step: _Compute, values: list[Any], fixed: set[int]) -> list[Any]:
        kept = [slot in fixed or slot in self._fixed_slots for slot in step.inputs]
        return [values[slot] if keep else None for slot, keep in zip(step.inputs, kept, strict=True)]

    def _cross(self, step: _Cross, call: Call, values: list[Any]) -> None:
        crossing = step.crossing
        operands = [values[source] if isinstance(source, int) else source for source in step.operands]
        registered = get_boundary(crossing.params["name"])
        known = crossing.registered
        if registered is not None and registered is not known and registered.consumed != known.consumed:
            raise BoundaryError(
                f"boundary {crossing.label}: was registered anew, with other operands that it consumes: must consume "
                "what it did when the function was split"
            )
        for number in crossing.copied:
            operands[number] = jax.numpy.array(operands[number], copy=True)
        if self._placement.mesh is not None:
            operands = [self._placement.lift(name, x) for name, x in zip(step.names, operands, strict=True)]
        place = "at the function's start" if crossing.after < 0 else f"after segment {crossing.after}"
        where = f"(call {crossing.index}, {place}, {self.signature.rows} rows)"
        name = crossing.params["name"]
        runtime = crossing.params["runtime"] if call.runtime is None else call.runtime
        try:
            told = BoundaryCall(name, where, call.live, runtime, self._placement.mesh, call.size)
            results = call_host(told, step.params, operands)
        except StaleCaptureError:
            raise
        except Exception as error:
            if call.epoch is not None and call.epoch.value != call.life:
                raise StaleCaptureError(
                    f"boundary {crossing.label} {where}: its resources were resized or released while it ran"
                ) from error
            raise
        for slot in step.frees:
            values[slot] = None
        # the next segment may be given a result's buffer for good: no one else may hold it
        held = {id(x) for number, x in enumerate(operands) if number not in crossing.consumed}
        for slot, result in zip(step.results, results, strict=True):
            if not isinstance(result, jax.Array):
                result = self._placement.value(result)
            elif id(result) in held:
                result = jax.numpy.array(result, copy=True)
            held.add(id(result))
            values[slot] = result


def _weak(epoch: Epoch | None) -> weakref.ref[Epoch] | None:
    return None if epoch is None else weakref.ref(epoch)
