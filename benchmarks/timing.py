"""Device time of a function: many calls in one executable, dispatched back to back, and one wait at the end.

Calls too short for the host to keep up with repeat in a loop on the device: the executable is one CUDA graph, its loop
included, so that nothing but the device decides the pace.

An executable holds `calls` calls on different inputs (so that XLA can neither merge nor reorder them into one), chained
through the output buffer where the operation takes one. Dispatches follow each other without waiting and rotate through
the sets of inputs; dispatching runs ahead of the device, so the wall time of a long enough run is device time. Where it
cannot run ahead, the result says so (`host_bound`).
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

RUN_SECONDS = 0.02
REPEATS = 5
MOST_CALLS = 16
BURST = 8
CALLS_SECONDS = 1e-3  # what one executable should take
SHORT_SECONDS = 100e-6  # shorter calls repeat in a loop on the device,
GRAPH_SECONDS = 1e-3  # and those shorter than this where all of a call can be in a CUDA graph
MOST_CALLS_A_ROUND = 32
LEAST_CALLS_A_ROUND = 8  # a round itself takes some microseconds
ROUNDS_SECONDS = 4e-3  # what such a loop should take
GRAPH_COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds a call.

    Attributes:
      us: median of the repeats.
      spread: (largest - smallest) / median.
      calls: calls in one executable.
      host_bound: dispatching takes the host about as long, so the device may be faster than this.
    """

    us: float
    spread: float
    calls: int
    host_bound: bool


def calls_for(expected_seconds: float) -> int:
    """Calls for one executable: enough to hide its launch, few enough to compile quickly."""
    return max(1, min(MOST_CALLS, round(CALLS_SECONDS / expected_seconds)))


def calls_and_rounds(expected_seconds: float, sets: int, short: float = SHORT_SECONDS) -> tuple[int, int]:
    """(calls in one executable, times that it goes through them): a round of short calls takes in most input sets."""
    calls = calls_for(expected_seconds)
    if expected_seconds >= short:
        return calls, 1
    calls = max(calls, min(sets, MOST_CALLS_A_ROUND), LEAST_CALLS_A_ROUND)
    return calls, max(2, round(ROUNDS_SECONDS / expected_seconds / calls))  # one round would be no loop


def compiler_options(rounds: int) -> dict[str, Any]:
    """On a GPU: calls of one executable run strictly one after another, also when captured as a CUDA graph."""
    if jax.default_backend() != "gpu":
        return {}
    options: dict[str, Any] = {"xla_gpu_command_buffer_scheduling_mode": "SERIALIZE"}
    if rounds > 1:
        options |= {"xla_gpu_enable_command_buffer": f"{GRAPH_COMMANDS},WHILE", "xla_gpu_graph_min_graph_size": 1}
    return options


def compile_calls(
    function: Callable[..., Any], args: Any, calls: int, out: Any = None, rounds: int = 1
) -> Callable[..., Any]:
    """Compiles `calls` calls of `function(*args)`, or of `function(*args, out=out)` chained through `out`.

    Args:
      function: what to time.
      args: arguments of one call, arrays or ShapeDtypeStructs.
      calls: how many.
      out: the output buffer's shape, or None.
      rounds: times to go through them all, in a loop on the device.

    Returns:
      An executable that takes a tuple of `calls` tuples of arguments (and the output buffer, which it consumes).
    """
    struct = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (tuple(args),) * calls)
    options = compiler_options(rounds)
    # traced and lowered once for all calls; XLA inlines what calls it, and has separate calls again
    call = jax.jit(function)

    def separate(sets):
        def once(i, _):
            # depends on the round, so that the calls cannot be taken out of the loop; costs no kernel
            tied = [(*jax.lax.optimization_barrier((own[0], i))[:1], *own[1:]) for own in sets] if rounds > 1 else sets
            return [call(*own) for own in tied]

        if rounds == 1:
            return once(0, None)
        shapes = [jax.eval_shape(call, *own) for own in sets]
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.fori_loop(0, rounds, once, empty)

    if out is None:
        return jax.jit(separate).lower(struct).compile(compiler_options=options)

    def chained(sets, out):
        def once(_, out):
            for own in sets:
                out = call(*own, out=out)
            return out

        return once(0, out) if rounds == 1 else jax.lax.fori_loop(0, rounds, once, out)

    buffer = jax.ShapeDtypeStruct(out.shape, out.dtype)
    return jax.jit(chained, donate_argnums=1).lower(struct, buffer).compile(compiler_options=options)


def time_compiled(
    compiled: Callable[..., Any],
    sets: Sequence[tuple],
    calls: int,
    out: jax.Array | None = None,
    repeats: int = REPEATS,
    rounds: int = 1,
) -> Timing:
    """Times an executable of `compile_calls`.

    Args:
      compiled: the executable.
      sets: sets of arguments to rotate through, any number of them.
      calls: as compiled.
      out: an output buffer (consumed), where it was compiled with one.
      repeats: how many runs to take the median of.
      rounds: as compiled.
    """
    rotation = itertools.cycle(sets)
    groups = [tuple(itertools.islice(rotation, calls)) for _ in range(max(1, -(-len(sets) // calls)))]
    following = itertools.cycle(groups)

    def run(count: int) -> tuple[float, float]:
        nonlocal out
        result = None
        begin = time.perf_counter()
        for _ in range(count):
            if out is None:
                result = compiled(next(following))
            else:
                result = out = compiled(next(following), out)
        dispatched = time.perf_counter() - begin
        jax.block_until_ready(result)
        return time.perf_counter() - begin, dispatched

    run(2)  # warm-up
    count = max(2, min(400, round(RUN_SECONDS / max(run(3)[0] / 3, 1e-6))))
    runs = [run(count) for _ in range(repeats)]
    walls = [wall / count / calls / rounds * 1e6 for wall, _ in runs]
    median = statistics.median(walls)
    # a burst short enough not to be held up by the runtime's bound on executables in flight
    dispatching = statistics.median(run(BURST)[1] for _ in range(repeats)) / BURST
    host_bound = dispatching * 1e6 > 0.9 * median * calls * rounds
    return Timing(median, (max(walls) - min(walls)) / median, calls, host_bound)
