"""Decoding in plain jnp: rows attended to a few keys at a time give what all their keys at once give."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minimax_kernels import single_rows

ROWS, SELECTIONS, KV_HEADS, HEADS, DIM, PAGES, TAKEN = 3, 4, 2, 2, 8, 9, 5


@pytest.mark.parametrize(("block_size", "position"), [(16, 67), (128, 300)])  # several pages a turn; parts of a page
def test_turns_are_as_all_keys_at_once(block_size, position, monkeypatch):
    random = np.random.default_rng(0)
    q = jnp.asarray(random.standard_normal((ROWS, SELECTIONS, HEADS, DIM)), jnp.float32)
    k, v = random.standard_normal((2, PAGES, KV_HEADS, block_size, DIM)).astype(np.float32)
    pages = random.integers(0, PAGES - 1, (ROWS, SELECTIONS, TAKEN))
    starts = np.broadcast_to(np.arange(TAKEN) * block_size, pages.shape).copy()
    starts[1, :, 1:3], starts[0, 2, 4] = single_rows.NOWHERE, single_rows.NOWHERE
    pages[starts == single_rows.NOWHERE] = PAGES - 1
    k[-1], v[-1] = np.nan, np.nan  # nobody sees it
    args = (jnp.asarray(pages, jnp.int32), jnp.asarray(starts, jnp.int32), jnp.asarray([position, 3, -1], jnp.int32))
    weights = jnp.asarray(random.standard_normal(q.shape), jnp.float32)

    def run(elements):
        monkeypatch.setattr(single_rows, "_CHUNK_ELEMENTS", elements)
        assert (np.prod(single_rows._chunks(q, TAKEN, block_size)) < TAKEN * block_size) == (elements == 1)

        def loss(q, k, v):
            attended = single_rows.attend_single_rows(q, k, v, *args, scale=0.5)
            return (attended * weights).sum(), attended

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 2), has_aux=True))(q, k, v)

    (_, found), gradients = run(1)
    (_, expected), wanted = run(1 << 30)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.asarray(found[2]).any()
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5), gradients, wanted)
