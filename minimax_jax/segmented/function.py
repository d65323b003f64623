"""segmented_jit: a function as compiled segments around host functions."""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from minimax_jax.segmented.arguments import Arguments, aval_of, device_of, sizes_of, struct_of
from minimax_jax.segmented.boundary import get_boundary
from minimax_jax.segmented.executables import Executables
from minimax_jax.segmented.graphs import GraphUse, dump_options, graph_order, graph_use
from minimax_jax.segmented.jaxprs import trace
from minimax_jax.segmented.placement import OneDevice, OnMesh, Placement, local_shape, spread_specs
from minimax_jax.segmented.program import Call, HostTime, Program, Signature
from minimax_jax.segmented.runner import Runner
from minimax_jax.segmented.split import Split, split
from minimax_jax.segmented.stats import Counts, Stats

_EXACT_PROGRAMS = 4  # programs of sizes without a bucket that are kept


def segmented_jit(
    fn: Callable[..., Any],
    *,
    boundaries: Sequence[str],
    buckets: Sequence[int],
    rows: int | Sequence[int] = 0,
    donate: int | Sequence[int] = (),
    mesh: jax.sharding.Mesh | None = None,
    in_specs: Any = None,
    out_specs: Any = None,
    warmups: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
    dump_to: str | Path | None = None,
) -> SegmentedFunction:
    """Compiles `fn` as segments between its boundaries, which run on the host.

    Args:
      fn: a function of positional pytrees of arrays that calls registered boundaries. It is traced once a bucket;
        arrays it closes over become inputs of its segments.
      boundaries: names to split at; other boundaries inside `fn` stay host callbacks of their segment.
      buckets: numbers of rows to compile for. A call is padded up to the next one with zeros; above the largest it
        runs at its exact size, uncaptured. Results come back padded.
      rows: numbers of the arguments whose leaves have the rows as axis 0.
      donate: numbers of the arguments whose buffers the call may consume.
      mesh: makes `fn` the body of one device of it, as for `jax.shard_map`, collectives over its axes included.
        Boundaries then see [devices, *shape on one device].
      in_specs, out_specs: with a mesh, how arguments and results are sharded: `PartitionSpec`s in a prefix of their
        structure. Rows are not sharded.
      warmups: eager calls of a bucket before it is captured.
      compiler_options: XLA's, for every segment.
      dump_to: directory for XLA's dumps, from which `graphs` and `explain` tell what lies in CUDA graphs.

    Raises:
      ValueError: for options out of range.
    """
    return SegmentedFunction(
        fn,
        boundaries=boundaries,
        buckets=buckets,
        rows=rows,
        donate=donate,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        warmups=warmups,
        compiler_options=compiler_options,
        dump_to=dump_to,
    )


class SegmentedFunction:
    """See `segmented_jit`. Calls from several threads are safe."""

    def __init__(
        self,
        fn: Callable[..., Any],
        *,
        boundaries: Sequence[str],
        buckets: Sequence[int],
        rows: int | Sequence[int],
        donate: int | Sequence[int],
        mesh: jax.sharding.Mesh | None,
        in_specs: Any,
        out_specs: Any,
        warmups: int,
        compiler_options: Mapping[str, Any] | None,
        dump_to: str | Path | None,
    ):
        if (mesh is None) != (in_specs is None) or (mesh is None) != (out_specs is None):
            raise ValueError("mesh, in_specs and out_specs: give all three, or none of them")
        self._mesh, self._in_specs, self._out_specs = mesh, in_specs, out_specs
        self._fn = fn
        self._label = getattr(fn, "__name__", "fn").strip("<>_") or "fn"
        if isinstance(boundaries, str) or not all(isinstance(name, str) for name in boundaries):
            raise ValueError(f"boundaries = {boundaries!r}: must be a sequence of names")
        self._boundaries = frozenset(boundaries)
        self.buckets = sizes_of(buckets)
        self._arguments = Arguments(self._label, rows, donate)
        if isinstance(warmups, bool) or not isinstance(warmups, int) or warmups < 0:
            raise ValueError(f"warmups = {warmups!r}: must be an integer >= 0")
        self._warmups = warmups
        self._dump_to = None if dump_to is None else Path(dump_to)
        self._options = {**(compiler_options or {}), **(dump_options(self._dump_to) if self._dump_to else {})}
        self._lock = threading.RLock()
        self._executables = Executables(self._label, self._options)
        self._runners: list[Runner] = []
        self._programs: dict[tuple[int, Any], list[Program]] = {}
        self._exact: collections.OrderedDict[Any, Program] = collections.OrderedDict()
        self._counts = Counts()

    def padded_rows(self, live: int) -> int:
        """Rows that a call of `live` rows runs with: the next bucket's, its own above the largest."""
        place = bisect.bisect_left(self.buckets, live)
        return live if place == len(self.buckets) else self.buckets[place]

    def __call__(self, *args: Any, runtime: Any = None, live: int | None = None) -> Any:
        """Runs the function; the result's rows are those of the bucket.

        Args:
          live: rows that hold data, where the caller has padded the arguments to `padded_rows` already; None for all.
          runtime: what boundaries find as `BoundaryCall.runtime`. If it has an `epoch` (and a `life`, the epoch's
            value when it was made), captures belong to that life.

        Raises:
          BoundaryError and its kinds: from a boundary; the function stays usable.
          StaleCaptureError: if the runtime's resources were replaced since it was made, or during the call.
          ValueError: for arguments that do not fit.
        """
        leaves, tree, given = self._arguments.read(args)
        if live is None:
            live = given
        elif not 0 < live <= given or given != self.padded_rows(live):
            raise ValueError(f"live = {live}: arguments of {given} rows must have {self.padded_rows(live)}")
        rows = self.padded_rows(live)
        if rows > self.buckets[-1]:
            return self._run_exact("fallbacks", leaves, tree, live, runtime)
        call = _call(self._arguments.padded(leaves, tree, given, rows), live, runtime)
        spent = HostTime()
        with self._counting_failures():
            program = self._program(call.values, tree, rows)
            old = program.replaced(call)
            captures = program.captured(call)
            if old:
                self._let_go(old)
            if captures is not None:
                kind, results = "replays", program.replay(call, captures, spent)
            elif program.is_warm(self._warmups):
                kind, results = "captures", program.capture(call, spent)
            else:
                kind, results = "warmups", program.eager(call, spent)
        self._count(kind, spent, program.num_crossings)
        return jax.tree.unflatten(program.out_tree, results)

    def eager(self, *args: Any, runtime: Any = None) -> Any:
        """Runs the segments at the exact number of rows: nothing is padded, captured or replayed."""
        return self._run_exact("eager", *self._arguments.read(args), runtime)

    def warm_up(
        self, example: Callable[[int], tuple[tuple[Any, ...], Any]], buckets: Sequence[int] | None = None
    ) -> None:
        """Compiles and captures buckets, the largest first, so that its memory serves the others.

        Args:
          example: (arguments, runtime) of a call with that many rows.
          buckets: None for all.
        """
        for bucket in sorted(self.buckets if buckets is None else sizes_of(buckets), reverse=True):
            for _ in range(self._warmups + 1):
                args, runtime = example(bucket)
                self(*args, runtime=runtime)

    def invalidate(self) -> None:
        """Forgets everything captured; executables stay. Calls in flight end with the buffers they began with."""
        with self._lock:
            for runner in self._runners:
                runner.clear()
            for programs in self._programs.values():
                for program in programs:
                    program.clear()

    def _let_go(self, leaves: list[Any]) -> None:
        """Has all buckets forget captures of leaves that were replaced, so that old weights do not stay alive."""
        with self._lock:
            for programs in self._programs.values():
                for program in programs:
                    program.let_go({id(leaf) for leaf in leaves})

    def stats(self) -> Stats:
        """What happened so far."""
        with self._lock:
            return self._counts.snapshot(
                executables=len(self._executables),
                compile_seconds=self._executables.seconds,
                segments=max(
                    (len(program.entries) for programs in self._programs.values() for program in programs), default=0
                ),
                invalidations=max((runner.clears for runner in self._runners), default=0),
                buckets=tuple(sorted({rows for rows, _ in self._programs})),
                captured=sum(program.is_captured for programs in self._programs.values() for program in programs),
            )

    def explain(self, *, rows: int | None = None) -> str:
        """The split of one bucket in words and a picture of it, what its executables are, and the stats.

        Args:
          rows: a bucket that was called; None for the largest one so far.
        """
        from minimax_jax.segmented.explain import explain_text

        program = self.program(rows)
        graphs = self.graphs(rows=program.signature.rows)
        return explain_text(self._label, program, self.stats(), graphs, graph_order(self._options))

    def graphs(self, *, rows: int | None = None) -> dict[str, GraphUse]:
        """By executable of a bucket, its CUDA graphs; empty without `dump_to` and on other devices."""
        if self._dump_to is None:
            return {}
        names = {entry.executable.name for entry in self.program(rows).entries}
        found = {name: graph_use(self._dump_to, f"{self._label}_{name}") for name in names}
        return {name: use for name, use in sorted(found.items()) if use is not None}

    def picture(self, *, rows: int | None = None) -> str:
        """The split of one bucket as an SVG image."""
        from minimax_jax.segmented.explain import explain_svg

        return explain_svg(self._label, self.program(rows))

    def program(self, rows: int | None = None) -> Program:
        """The program of a bucket, for inspection.

        Raises:
          ValueError: if none was called yet.
        """
        with self._lock:
            known = sorted({bucket for bucket, _ in self._programs})
            wanted = known[-1] if rows is None and known else rows
            for (bucket, _), programs in self._programs.items():
                if bucket == wanted and programs:
                    return programs[-1]
        raise ValueError(f"rows = {rows}: nothing of that size was called yet (buckets called: {known})")

    def _program(self, leaves: list[Any], tree: Any, rows: int) -> Program:
        with self._lock:
            for program in self._programs.get((rows, tree), ()):
                if program.fits(leaves):
                    return program
            program = self._build(leaves, tree, rows, self._executables, self._runners)
            self._programs.setdefault((rows, tree), []).append(program)
            return program

    def _run_exact(self, kind: str, leaves: list[Any], tree: Any, live: int, runtime: Any) -> Any:
        call = dataclasses.replace(_call(list(leaves), live, runtime), size="exact")
        key = (tree, tuple(aval_of(leaf) for leaf in leaves))
        with self._counting_failures():
            with self._lock:
                program = self._exact.pop(key, None)
                if program is None:
                    # executables of its own, which go with it: sizes without a bucket may be endlessly many
                    program = self._build(leaves, tree, live, Executables(f"{self._label}_exact", self._options), [])
                self._exact[key] = program
                while len(self._exact) > _EXACT_PROGRAMS:
                    self._exact.popitem(last=False)
            results = program.eager(call, HostTime())
        self._count(kind, None, 0)
        return jax.tree.unflatten(program.out_tree, results)

    def _build(
        self, leaves: list[Any], tree: Any, rows: int, executables: Executables, runners: list[Runner]
    ) -> Program:
        start = time.perf_counter()
        avals = tuple(aval_of(leaf) for leaf in leaves)
        out_trees: list[Any] = []

        def flat(*values: Any) -> list[Any]:
            results, out_tree = jax.tree.flatten(self._fn(*jax.tree.unflatten(tree, values)))
            out_trees.append(out_tree)
            return results

        structs = [struct_of(aval) for aval in avals]
        specs = self._leaf_specs(tree)
        if self._mesh is not None:
            structs = [
                jax.ShapeDtypeStruct(local_shape(self._mesh, x.shape, spec), x.dtype, weak_type=x.weak_type)
                for x, spec in zip(structs, specs, strict=True)
            ]
        traced = trace(flat, structs, self._boundaries, dict(self._mesh.shape) if self._mesh else None)
        row_leaves = self._arguments.row_leaves(tree)
        consumed = {*row_leaves, *self._arguments.donated_leaves(tree)}
        # a row argument at exactly the bucket's size is the caller's own array
        mine = [number in consumed and number not in row_leaves for number in range(len(leaves))]
        parts = split(traced, self._boundaries, mine)
        self._require_boundaries(parts)
        self._counts.traces += 1
        self._counts.trace_seconds += time.perf_counter() - start
        placement: Placement
        if self._mesh is None:
            placement = OneDevice(device_of([*leaves, *traced.consts]))
        else:
            results = spread_specs("out_specs", self._out_specs, out_trees[0])
            placement = OnMesh(self._mesh, traced.invars, specs, traced.constvars, results)
        built = executables.build(parts, placement)
        needed = max(len(built), 1)
        while len(runners) < needed:
            runners.append(Runner(len(runners)))
        keep = set(range(len(leaves))) - consumed
        return Program(Signature(rows, tree, avals), parts, built, runners[:needed], keep, placement, out_trees[0])

    def _require_boundaries(self, parts: Split) -> None:
        """Names that are neither registered nor met are misspelt: the boundary that was meant would be no split."""
        met = {crossing.params["name"] for crossing in parts.crossings}
        if missing := sorted(name for name in self._boundaries - met if get_boundary(name) is None):
            raise ValueError(f"boundaries has {missing[0]!r}: must be registered, or met in {self._label}")

    def _leaf_specs(self, tree: Any) -> list[Any]:
        if self._mesh is None:
            return []
        specs = spread_specs("in_specs", self._in_specs, tree)
        for number in self._arguments.row_leaves(tree):
            if len(specs[number]) and specs[number][0] is not None:
                raise ValueError(f"in_specs has {specs[number]} for an argument in rows: axis 0 must not be sharded")
        return specs

    @contextlib.contextmanager
    def _counting_failures(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with self._lock:
                self._counts.failures += 1
            raise

    def _count(self, kind: str, spent: HostTime | None, pairs: int) -> None:
        with self._lock:
            setattr(self._counts, kind, getattr(self._counts, kind) + 1)
            if kind == "replays" and spent is not None:
                self._counts.replay_seconds += spent.total
                self._counts.boundary_seconds += spent.boundaries
                self._counts.pairs += pairs


def _call(values: list[Any], live: int, runtime: Any) -> Call:
    """Raises `StaleCaptureError` if the runtime was made in an earlier life of its resources."""
    epoch = getattr(runtime, "epoch", None)
    if epoch is None:
        return Call(values, live, runtime, None, 0)
    life = getattr(runtime, "life", epoch.value)
    epoch.check(life, "the runtime of this call")
    return Call(values, live, runtime, epoch, life)
