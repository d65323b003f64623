"""The executables of decode steps, compiled side by side before they run, in each way in which they are launched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from minimax_jax.engine.graph_options import LOOPS_IN_GRAPHS
from minimax_jax.engine.pick_arrays import loop_features, pick_parameters
from minimax_jax.engine.scheduler import StepPlan
from minimax_jax.engine.step_inputs import PickInputs, StepInputs
from minimax_jax.engine.step_runner import StepRunner
from minimax_jax.engine.steps import Steps
from minimax_jax.rank_slice.cases import Launching
from minimax_kernels import Batch

_NO_GRAPHS = {"xla_gpu_enable_command_buffer": ""}


class DecodePrograms:
    """Stands in for the two executables of decode steps in a `StepRunner`.

    Attributes:
      launching: how steps are launched from now on.
    """

    def __init__(self, steps: Steps, platform: str):
        self.launching = Launching(1, True)
        self._steps, self._on_gpu = steps, platform == "gpu"
        self._layers: Any = steps.layers
        steps.layers = self._run_layers  # type: ignore[assignment]
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def attach(self, runner: StepRunner) -> None:
        """To be called once the runner is there, whose steps of several a launch come here too."""
        runner._decode = self._run_loop

    def compile(
        self,
        launching: Launching,
        leaves: list[Any],
        runner: StepRunner,
        plan: StepPlan,
        rows: int,
        widths: Sequence[int],
    ) -> Any:
        """Compiles launches of a plan's `rows` rows with block tables of these widths, and gives the widest's program.

        Raises:
          jax.errors.JaxRuntimeError: if XLA does not compile it.
          NotImplementedError: if JAX has no lowering of it for this device.
        """
        for width in widths:
            compiled = self._compile(launching, leaves, runner, plan, rows, width)
            self._compiled[launching, rows, width] = compiled
        return compiled

    def _compile(
        self, launching: Launching, leaves: list[Any], runner: StepRunner, plan: StepPlan, rows: int, width: int
    ) -> Any:
        def ids(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        def shapes(tree: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

        batch: Any = Batch(ids(rows, width), ids(rows + 1), ids(rows))
        step = StepInputs(ids(rows), ids(rows), ids(rows), ids(rows), batch, ids(rows))
        leaves, caches, state = shapes((leaves, runner.pool.caches, runner._state))
        options: dict[str, Any] | None = None
        if self._on_gpu:
            in_graphs = LOOPS_IN_GRAPHS if launching.steps > 1 else None  # XLA's own choice has all but loops
            options = in_graphs if launching.graphs else _NO_GRAPHS
        if launching.steps == 1:
            return self._layers.lower(leaves, caches, ids(runner.num_slots), step).compile(options)
        features = loop_features([row.sequence for row in plan.rows], runner._end_ids)
        sampling, adjustments = shapes(
            pick_parameters([plan], rows, runner._model.vocab_size, runner._end_ids, widest=False)
        )
        picking = PickInputs(ids(rows), ids(rows), ids(rows), sampling, adjustments)
        decode: Any = self._steps.decode
        lowered = decode.lower(
            caches, state, leaves, step, picking, ids(rows), features=features, num_steps=launching.steps
        )
        return lowered.compile(options)

    def _run_layers(self, leaves: Any, caches: Any, last_tokens: Any, step: StepInputs) -> Any:
        found = self._compiled.get((self.launching, *step.batch.block_tables.shape), self._layers)
        return found(leaves, caches, last_tokens, step)

    def _run_loop(
        self, caches: Any, state: Any, leaves: Sequence[Any], step: StepInputs, rows: Any, counts: Any, **static: Any
    ) -> Any:
        compiled = self._compiled[(self.launching, *step.batch.block_tables.shape)]
        return compiled(caches, state, leaves, step, rows, counts)
