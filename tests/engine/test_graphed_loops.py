"""What would keep a loop of decode steps out of a CUDA graph: seen in what is lowered for CUDA, without a GPU."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_states import sampling_state

from minimax_jax.cache import PagedCaches
from minimax_jax.engine import sampler
from minimax_jax.engine.decode_loop import NO_TOKEN, run_decode_steps
from minimax_jax.engine.logprobs import token_logprobs
from minimax_jax.engine.row_state import Adjustments, empty_rows, record_tokens
from minimax_jax.engine.sampler import pick_tokens
from minimax_jax.engine.step_inputs import PickInputs, StepInputs
from minimax_kernels import Batch, sampling_cut

ROWS, STEPS = 3, 4


def on_cuda(function, *args) -> str:
    """As StableHLO; from jax 0.11 on, lowering asks which GPU it is for."""
    with contextlib.ExitStack() as stack:
        if hasattr(jax.sharding, "AbstractDevice"):
            device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
            mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        traced_anew = jax.jit(lambda *args: function(*args))
        return traced_anew.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("vocab_size", [300, 25008])
def test_sampling_sorts_nothing_and_branches_nowhere(vocab_size, monkeypatch):
    """XLA sorts by a library whose calls fit into no graph."""
    logits, state = jnp.zeros((ROWS, vocab_size)), sampling_state(0, ROWS, 1.0, 0.9, 40, vocab_size)
    pick = functools.partial(pick_tokens, greedy=False, truncated=True)
    assert "top_k" in on_cuda(pick, logits, jnp.arange(ROWS), state), "by which the last line looks"
    monkeypatch.setattr(sampler, "sampling_cut", functools.partial(sampling_cut, impl="pallas_triton"))
    text = on_cuda(pick, logits, jnp.arange(ROWS), state)
    assert "sampling_cut" in text
    assert not [word for word in ("stablehlo.sort", "top_k", "stablehlo.case", "stablehlo.if") if word in text]


@pytest.mark.parametrize("num_logprobs", [None, 2])
def test_results_of_a_loop_are_written_by_no_slice(num_logprobs):
    """A slice may become a copy whose address the loop counts up. Each token here is the last one plus one."""

    def layers(caches, last_tokens, step):
        return None, step.tokens, caches

    def pick(state, hidden, rows):
        logits = jax.nn.one_hot(hidden + 1, 50)
        tokens = logits.argmax(axis=-1).astype(jnp.int32)
        logprobs = None if num_logprobs is None else token_logprobs(logits, tokens, num_logprobs)
        return tokens, logprobs, record_tokens(state, rows.writes, tokens, counted=False)

    ids, f32 = jnp.arange(ROWS, dtype=jnp.int32), jnp.zeros(ROWS)
    begin = jnp.array([5, 10, 20], jnp.int32)
    first = StepInputs(begin, ids * 0 - 1, ids + 16, ids, Batch(ids[:, None], jnp.arange(ROWS + 1), ids + 17), ids)
    adjustments = Adjustments(f32, f32, f32, ids[:, None][:, :0], f32[:, None][:, :0], jnp.array([[12]] * ROWS), ids)
    rows = PickInputs(ids + 17, ids, ids, sampling_state(0, ROWS, 0.0, 1.0, 0, 50), adjustments)
    run = functools.partial(run_decode_steps, layers, pick, num_steps=STEPS, page_size=16, num_logprobs=num_logprobs)
    args = PagedCaches((), (), ()), empty_rows(ROWS, 50), first, rows, jnp.array([4, 4, 2], jnp.int32)
    tokens, logprobs, state, _ = jax.jit(run)(*args)
    expected = [[6, 7, 8, 9], [11, 12, NO_TOKEN, NO_TOKEN], [21, 22, NO_TOKEN, NO_TOKEN]]
    assert tokens.tolist() == expected and state.last_tokens.tolist() == [9, 12, 22]
    assert (logprobs is None) == (num_logprobs is None)
    if logprobs is not None:
        live = np.array(expected) != NO_TOKEN
        assert (np.asarray(logprobs.top_ids)[..., 0] == expected)[live].all()
        assert (np.asarray(logprobs.ranks) == 1)[live].all()
    assert "dynamic_update_slice" not in on_cuda(run, *args)
