"""The pages of a context under every sequence of operations: each row keeps its own, and what is in them."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimax_jax import MiniMaxM3Config
from minimax_jax.cache import CachePlacement, PagedCaches, PastKeyValues

BLOCK = 4
CONFIG = MiniMaxM3Config(
    vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2,
    rotary_dim=2, index_head_dim=2, index_n_heads=1, index_block_size=BLOCK, num_local_experts=2,
    num_experts_per_tok=1, layer_types=("full_attention",), mlp_layer_types=("dense",),
)  # fmt: skip


def slots_of(past, row):
    """(group, page, offset) of each token of a row, by its tables."""
    group = row // past.rows_per_group
    length = int(past.kv_lens[row])
    return [(group, int(past.block_tables[row, i // BLOCK]), i % BLOCK) for i in range(length)]


def write(past, row, start, values):
    with past.pool.borrow() as lent:
        keys = np.array(lent.caches.k[0])
        for i, value in enumerate(values, start):
            group = row // past.rows_per_group
            keys[group * past.pool.num_pages + past.block_tables[row, i // BLOCK], 0, i % BLOCK] = value
        lent.caches = PagedCaches((jnp.asarray(keys),), lent.caches.v, lent.caches.index)


def read(past, row):
    keys = np.asarray(past.pool.caches.k[0])
    return [float(keys[g * past.pool.num_pages + page, 0, offset, 0]) for g, page, offset in slots_of(past, row)]


OPERATION = st.one_of(
    st.tuples(st.just("append"), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
    st.tuples(st.just("crop"), st.integers(0, 12)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 5), min_size=1, max_size=5)),
)


@settings(max_examples=12)
@given(st.integers(1, 3), st.sampled_from([1, 2]), st.lists(OPERATION, min_size=1, max_size=7))
def test_rows_keep_their_own_pages(rows, groups, operations):
    place = None if groups == 1 else CachePlacement(kv=None, index=None, kv_heads=1, groups=groups)  # type: ignore[arg-type]
    past = PastKeyValues(CONFIG, rows, "float32", place)
    model = [[] for _ in range(rows)]  # the cells of each row: a value, or None for padding
    next_value = 1.0
    for name, argument in operations:
        if name == "append":
            counts = [argument[row % len(argument)] for row in range(past.batch_size)]
            width = max(counts) or 1
            kept = np.arange(width) < np.array(counts)[:, None]
            past.reserve(past.kv_lens + counts)
            for row, count in enumerate(counts):
                values = [next_value + i for i in range(count)]
                write(past, row, int(past.kv_lens[row]), values)
                model[row] = model[row] + values + [None] * (width - count)
                next_value += count
            past.append(kept)
        elif name == "crop":
            count = min(argument, past.get_seq_length())
            past.crop(-count)
            model = [row[: len(row) - count] for row in model]
        else:
            chosen = [i % past.batch_size for i in argument]
            past.batch_select_indices(chosen)
            model = [list(model[i]) for i in chosen]
        used = [slot[:2] for row in range(past.batch_size) for slot in sorted({s[:2] for s in slots_of(past, row)})]
        assert len(used) == len(set(used))  # no page belongs to two rows
        assert all(page < past.pool.num_pages for _, page in used)
        assert [read(past, row) for row in range(past.batch_size)] == [
            [value for value in row if value is not None] for row in model
        ]
        assert past.get_seq_length() == len(model[0])


def test_growth_is_in_buckets():
    past = PastKeyValues(CONFIG, 2, "float32")
    sizes = set()
    for length in range(1, 200):
        past.reserve(np.array([length, length]))
        sizes.add(past.pool.num_pages)
    assert len(sizes) <= 12


def test_a_row_cannot_be_chosen_by_a_mask():
    with pytest.raises(ValueError, match=r"indices = \[True, False\]: must be row numbers within 0..1"):
        PastKeyValues(CONFIG, 2, "float32").batch_select_indices([True, False])
