"""Steps of small models, segmented and whole, for the tests of execution modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from minimax_jax.attention import TracedAttend, step_layout
from minimax_jax.engine.segmented_prefill import FlatStep, SegmentedPrefill
from minimax_jax.model import merge_model
from minimax_kernels import Batch

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: _compiled.append(name) if name == COMPILE_EVENT else None
)


def compilations() -> int:
    """XLA compilations of this process so far, by JAX's own events."""
    return len(_compiled)


def segmented_steps(model, **options) -> SegmentedPrefill:
    return SegmentedPrefill(model.config, model._graphdef, model._names, **{"max_tokens": 64, **options})


def make_step(config, tables, query_lens, kv_lens, seed=0) -> FlatStep:
    """Random tokens for requests that have `kv_lens` tokens, the new `query_lens` included."""
    layout = step_layout(np.asarray(tables), np.asarray(query_lens), np.asarray(kv_lens), config.index_block_size)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, layout.num_tokens).astype(np.int32)
    pasts = np.asarray(kv_lens) - np.asarray(query_lens)
    positions = np.concatenate([past + np.arange(n) for past, n in zip(pasts, query_lens, strict=True)])
    return FlatStep(tokens, positions.astype(np.int32), layout)


def run_hidden(steps: SegmentedPrefill, model, pool, step: FlatStep, *, eager=False):
    """Hidden states of the live rows through segments; the pool is updated."""
    run = steps.layers.eager if eager else steps.layers
    hidden = run(model._leaves, step.tokens, step.positions, runtime=steps.attention.step(pool, step.layout))
    return np.asarray(hidden)[: len(step.tokens)]


def whole_hidden(model, pool, step: FlatStep):
    """The same as one jit with functional caches; the pool is updated."""
    layout = step.layout
    batch = Batch(*map(jnp.asarray, (layout.block_tables, layout.query_starts, layout.kv_lens)))
    run = _whole_step(model.config, model._graphdef, model._names)
    hidden, caches = run(model._leaves, pool.caches, step.tokens, step.positions, layout.slots, batch)
    pool.store(caches, pool.epoch.value)
    return np.asarray(hidden)


@functools.lru_cache(8)
def _whole_step(config, graphdef, names):
    @jax.jit
    def run(leaves, caches, tokens, positions, slots, batch):
        attend = TracedAttend(config, caches, batch, slots)
        merged = merge_model(graphdef, dict(zip(names, leaves, strict=True)))
        return merged.run_layers(merged.embed(tokens), positions, attend), attend.caches()

    return run


def logits_of(model, hidden):
    return np.asarray(_head(model._graphdef, model._names)(model._leaves, hidden))


@functools.lru_cache(8)
def _head(graphdef, names):
    return jax.jit(lambda leaves, hidden: merge_model(graphdef, dict(zip(names, leaves, strict=True))).head(hidden))


def assert_close_logits(got, expected, tolerance=1e-5):
    """Within rounding: relative to the logits' spread."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * (expected.max() - expected.min()))
