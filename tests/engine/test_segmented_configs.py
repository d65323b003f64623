"""Random small models: segments say what whole steps say."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from segmented_steps import assert_close_logits, logits_of, make_step, run_hidden, segmented_steps, whole_hidden
from small_models import small_model

from minimax_jax.cache import PagePool
from minimax_jax.config import DENSE_MLP, FULL_ATTENTION, MOE_MLP, SPARSE_ATTENTION

LAYERS = st.lists(
    st.tuples(st.sampled_from([FULL_ATTENTION, SPARSE_ATTENTION]), st.sampled_from([DENSE_MLP, MOE_MLP])),
    min_size=1,
    max_size=4,
)


@st.composite
def configs(draw):
    """Changes to the small configuration: its layers, heads, experts and blocks."""
    attention, mlps = zip(*draw(LAYERS), strict=True)
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    topk = draw(st.integers(1, 3))
    return {
        "num_hidden_layers": len(attention),
        "layer_types": attention,
        "mlp_layer_types": mlps,
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2])),
        "num_key_value_heads": kv_heads,
        "index_n_heads": draw(st.sampled_from([n for n in (1, 2, 4) if n <= kv_heads])),
        "index_topk_blocks": topk,
        "index_init_blocks": draw(st.integers(0, topk - 1)),
        "index_block_size": draw(st.sampled_from([8, 16, 32])),
        "num_experts_per_tok": draw(st.integers(1, 2)),
        "tie_word_embeddings": draw(st.booleans()),
    }


ALL_SPARSE = {
    "layer_types": (SPARSE_ATTENTION,) * 2, "mlp_layer_types": (MOE_MLP,) * 2,
    "num_key_value_heads": 4, "index_n_heads": 1, "index_topk_blocks": 1, "num_experts_per_tok": 1,
}  # fmt: skip
ALL_DENSE = {
    "layer_types": (FULL_ATTENTION,) * 2, "mlp_layer_types": (MOE_MLP, DENSE_MLP), "tie_word_embeddings": True,
}  # fmt: skip


NEW = 4  # greedy tokens of each prompt; their steps are warm-up, capture and replays


# a failing case is small, and shrinking it would compile models for minutes
@settings(max_examples=2, phases=[Phase.explicit, Phase.reuse, Phase.generate], suppress_health_check=list(HealthCheck))
@given(configs(), st.lists(st.integers(1, 40), min_size=1, max_size=2), st.sampled_from([32, 80]), st.integers(0, 9))
@example(ALL_SPARSE, [30, 2], 32, 5)
@example(ALL_DENSE, [17, 3], 32, 5)
def test_random_models_say_the_same_in_segments_and_whole(changes, lengths, bucket, seed):
    """Prompts and the greedy tokens after them, against one whole step over all of these."""
    model, lengths = small_model(seed=seed, **changes), np.array(lengths)
    config, steps = model.config, segmented_steps(model, buckets=(bucket,))
    pages = -(-(lengths.max() + NEW) // config.index_block_size)
    tables = np.random.default_rng(seed).permutation(pages * len(lengths)).reshape(len(lengths), pages)
    pool = PagePool(config, tables.size, jnp.float32)

    step = make_step(config, tables, lengths, lengths, seed)
    texts, logits = by_request(step, step.tokens), [[] for _ in lengths]
    for number in range(1, NEW + 1):
        for text, rows, found in zip(
            texts, logits, by_request(step, logits_of(model, run_hidden(steps, model, pool, step))), strict=True
        ):
            rows.extend(found)
            text.append(found[-1].argmax())
        step = make_step(config, tables, np.ones_like(lengths), lengths + number)
        step = dataclasses.replace(step, tokens=np.array([text[-1] for text in texts], np.int32))
    assert steps.layers.stats().replays > 0

    read = lengths + NEW - 1  # nothing was asked about the last token
    step = make_step(config, tables, read, read)
    step = dataclasses.replace(step, tokens=np.concatenate([text[:-1] for text in texts]).astype(np.int32))
    whole = logits_of(model, whole_hidden(model, PagePool(config, tables.size, jnp.float32), step))
    assert_close_logits(np.concatenate(logits), whole)
    for text, rows in zip(texts, by_request(step, whole), strict=True):
        assert text[-NEW:] == np.argmax(rows[-NEW:], 1).tolist()


def by_request(step, rows):
    """Rows of a step's tokens, as a list for each request."""
    return [list(part) for part in np.split(rows, step.layout.query_starts[1:-1])]
