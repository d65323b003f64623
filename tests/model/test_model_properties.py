"""What holds of the model by itself: no other implementation is needed to say it."""

from __future__ import annotations

import cProfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from minimax_jax.attention import ReferenceAttend
from minimax_jax.config import DENSE_MLP, FULL_ATTENTION, MOE_MLP, SPARSE_ATTENTION, MiniMaxM3Config
from minimax_jax.model import Comm, MiniMaxM3, abstract_model, merge_model, split_model
from minimax_jax.model.linear import linear, linear_float32
from minimax_kernels import Mxfp8

BLOCK, TOPK = 16, 3
CONFIG = MiniMaxM3Config(
    vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    rotary_dim=8, dense_intermediate_size=48, intermediate_size=32, shared_intermediate_size=32, num_local_experts=4,
    num_experts_per_tok=2, index_n_heads=2, index_head_dim=16, index_block_size=BLOCK, index_topk_blocks=TOPK,
    layer_types=(FULL_ATTENTION, SPARSE_ATTENTION, SPARSE_ATTENTION), mlp_layer_types=(DENSE_MLP, MOE_MLP, MOE_MLP),
)  # fmt: skip
DENSE_LIMIT = TOPK * BLOCK  # tokens of context up to which all blocks are selected


def random_weights(config=CONFIG, seed=0):
    """Weights on the scale that makes logits spread; norms and routing bias not zero."""
    graphdef, shapes = split_model(abstract_model(config, jnp.float32))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    weights = {}
    for key, (name, leaf) in zip(keys, sorted(shapes.items()), strict=True):
        scale = 0.3 if leaf.ndim == 1 else 1.5 * leaf.shape[-1 if name == "embed_tokens" else -2] ** -0.5
        weights[name] = jax.random.normal(key, leaf.shape) * scale
    return graphdef, weights


def runner(config=CONFIG, attention=None):
    """jitted (weights, ids, query_starts) -> logits of a flat batch; `attention` is the config that attends."""
    graphdef, _ = split_model(abstract_model(config, jnp.float32))

    @jax.jit
    def run(weights, ids, starts):
        rows = jnp.arange(ids.shape[0])
        request = jnp.clip(jnp.searchsorted(starts[1:], rows, side="right"), 0, starts.shape[0] - 2)
        attend = ReferenceAttend(attention or config, starts, ids.shape[0])
        return merge_model(graphdef, weights)(ids, rows - starts[request], attend)

    return run


def tokens(count, seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, count)


def alone(run, weights, ids, like=None):
    """Of one request; `like` (ids, starts) gives the shapes of what is compiled already, and what fills them."""
    filled, starts = (ids, np.array([0, len(ids)])) if like is None else (like[0].copy(), np.zeros_like(like[1]))
    filled[: len(ids)], starts[1:] = ids, len(ids)
    return np.asarray(run(weights, jnp.asarray(filled), jnp.asarray(starts)))[: len(ids)]


@pytest.fixture(scope="module")
def weights():
    return random_weights()[1]


@pytest.fixture(scope="module")
def run():
    return runner()


def test_sparse_is_dense_up_to_topk_blocks_and_not_beyond(weights, run):
    ids = tokens(160)
    dense = runner(attention=CONFIG.replace(index_topk_blocks=1000))
    sparse_logits, dense_logits = alone(run, weights, ids), alone(dense, weights, ids)
    distance = np.abs(sparse_logits - dense_logits).max(axis=-1)
    assert dense_logits.std() > 0.5
    assert distance[:DENSE_LIMIT].max() <= 1e-5
    assert distance[DENSE_LIMIT + BLOCK :].max() > 1e-2
    assert (distance[DENSE_LIMIT + BLOCK :] > 1e-4).mean() > 0.9  # nearly every token there, not one by chance


def test_full_attention_equals_sparse_attention_of_all_blocks(weights):
    """The dense operation and the sparse one, on the same layers."""
    ids = tokens(100)
    all_blocks = CONFIG.replace(index_topk_blocks=1000)

    class DenseAttend(ReferenceAttend):
        def __call__(self, layer_id, q, k, v, idx_q, idx_k):
            return super().__call__(layer_id, q, k, v, None, None)

    graphdef, _ = split_model(abstract_model(CONFIG, jnp.float32))

    @jax.jit
    def dense_run(weights, ids):
        attend = DenseAttend(CONFIG, jnp.array([0, 100]), 100)
        return merge_model(graphdef, weights)(ids, jnp.arange(100), attend)

    dense = dense_run(weights, jnp.asarray(ids))
    np.testing.assert_allclose(dense, alone(runner(attention=all_blocks), weights, ids), atol=1e-5)


@pytest.mark.parametrize("lens", [[70, 1, 49], [16, 0, 104], [1, 2, 117]])
def test_ragged_batch_equals_each_request_alone(weights, run, lens):
    parts = [tokens(n, seed) for seed, n in enumerate(lens)]
    ids, starts = np.concatenate(parts), np.cumsum([0, *lens])
    together = np.asarray(run(weights, jnp.asarray(ids), jnp.asarray(starts)))
    for part, begin in zip(parts, starts, strict=False):
        if len(part):
            expected = alone(run, weights, part, like=(ids, starts))
            np.testing.assert_allclose(together[begin : begin + len(part)], expected, atol=2e-5)


def test_order_of_requests_changes_nothing(weights, run):
    first, second = tokens(40, 1), tokens(80, 2)
    one = run(weights, jnp.asarray(np.concatenate([first, second])), jnp.array([0, 40, 120]))
    other = run(weights, jnp.asarray(np.concatenate([second, first])), jnp.array([0, 80, 120]))
    np.testing.assert_allclose(one[:40], other[80:], atol=2e-5)
    np.testing.assert_allclose(one[40:], other[:80], atol=2e-5)


def test_padding_rows_change_nothing(weights, run):
    ids = tokens(120)
    live = run(weights, jnp.asarray(ids), jnp.array([0, 50, 90]))
    other = ids.copy()
    other[90:] = (other[90:] + 7) % CONFIG.vocab_size
    np.testing.assert_array_equal(live[:90], run(weights, jnp.asarray(other), jnp.array([0, 50, 90]))[:90])
    unpadded = run(weights, jnp.asarray(ids[:90]), jnp.array([0, 50, 90]))
    np.testing.assert_allclose(live[:90], unpadded, atol=2e-5)
    assert np.isfinite(np.asarray(live)).all()


def test_later_tokens_change_nothing_before_them(weights, run):
    ids = tokens(120)
    changed = ids.copy()
    changed[77:] = tokens(43, 5)
    one, other = alone(run, weights, ids), alone(run, weights, changed)
    np.testing.assert_allclose(one[:77], other[:77], atol=2e-5)
    assert np.abs(one[77:] - other[77:]).max() > 0.1


def test_gradients(weights):
    """Finite everywhere; the index branch learns nothing from the LM loss, every other matrix does."""
    graphdef, _ = split_model(abstract_model(CONFIG, jnp.float32))
    ids, starts = jnp.asarray(tokens(120)), jnp.array([0, 100, 110])  # ten rows of padding

    @jax.jit
    @jax.grad
    def gradient(weights):
        positions = jnp.concatenate([jnp.arange(100), jnp.arange(20)])
        logits = merge_model(graphdef, weights)(ids, positions, ReferenceAttend(CONFIG, starts, 120))
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), ids[1:, None], axis=-1)[:, 0]
        return jnp.where(jnp.arange(119) < 109, losses, 0).mean()

    for name, leaf in gradient(weights).items():
        largest = float(jnp.abs(leaf).max())
        assert np.isfinite(np.asarray(leaf)).all(), name
        if "index" in name or "e_score_correction_bias" in name:
            assert largest == 0, name
        else:
            assert largest > 0, name


def test_split_and_merge_round_trip():
    model = MiniMaxM3(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, weights = split_model(model)
    assert "layers.2.self_attn.index_q_proj" in weights and "layers.0.self_attn.index_q_proj" not in weights
    assert weights["lm_head"].shape == (CONFIG.hidden_size, CONFIG.vocab_size)
    assert weights["layers.1.mlp.gate.weight"].dtype == jnp.float32
    again_def, again = split_model(merge_model(graphdef, weights))
    assert again_def == graphdef
    assert list(again) == list(weights)
    for name in weights:
        np.testing.assert_array_equal(again[name], weights[name])
    expected = alone(runner(), weights, tokens(20))
    np.testing.assert_array_equal(alone(runner(), dict(reversed(weights.items())), tokens(20)), expected)


def test_merged_weights_are_the_ones_used(weights, run):
    ids = tokens(20)
    for name in ("embed_tokens", "layers.1.mlp.experts.down_proj", "layers.0.self_attn.q_norm.weight"):
        assert np.abs(alone(run, weights | {name: weights[name] * 1.5}, ids) - alone(run, weights, ids)).max() > 1e-3


def test_tied_model_has_no_head_of_its_own():
    _, names = split_model(abstract_model(CONFIG.replace(tie_word_embeddings=True)))
    assert "lm_head" not in names


def test_abstract_model_takes_equally_long_for_every_layer():
    """By calls of functions: a busy machine does not change them."""

    def calls(layers):
        changes = {"layer_types": (SPARSE_ATTENTION,) * layers, "mlp_layer_types": (MOE_MLP,) * layers}
        with cProfile.Profile() as profile:
            abstract_model(CONFIG.replace(num_hidden_layers=layers, **changes))
        return sum(entry.callcount for entry in profile.getstats())

    calls(1)  # what JAX keeps of a first one
    few, some, many = calls(4), calls(8), calls(12)
    assert many - some <= 1.1 * (some - few)


def test_abstract_model_takes_no_memory():
    before = {id(a) for a in jax.live_arrays()}
    _, shapes = split_model(abstract_model(MiniMaxM3Config.m3()))
    assert not [a for a in jax.live_arrays() if id(a) not in before and a.size > 1]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes.values())
    text = MiniMaxM3Config.m3().replace(vision=None)
    assert sum(leaf.size for leaf in shapes.values()) == text.num_parameters()
    assert shapes["layers.59.mlp.experts.gate_up_proj"].shape == (128, 6144, 6144)
    routers = {name for name, leaf in shapes.items() if leaf.dtype == jnp.float32}
    assert routers == {name for name in shapes if ".mlp.gate." in name} and len(routers) == 2 * 57
    assert {leaf.dtype for leaf in shapes.values()} == {np.dtype(jnp.bfloat16), np.dtype(np.float32)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_linear_with_an_mxfp8_weight(dtype):
    random = np.random.default_rng(0)
    values = (random.standard_normal((40, 96)) * 20).astype(ml_dtypes.float8_e4m3fn)
    scales = random.integers(118, 128, (40, 3)).astype(np.uint8)
    matrix = (values.astype(np.float64) * 2.0 ** (np.repeat(scales.astype(np.int64), 32, axis=1) - 127)).T
    x = jnp.asarray(random.standard_normal((7, 96)), dtype)
    result = linear(x, Mxfp8.from_rows(jnp.asarray(values), jnp.asarray(scales)))
    assert result.dtype == dtype
    exact = np.asarray(x, np.float64) @ matrix
    np.testing.assert_allclose(
        np.asarray(result, np.float64), exact, atol=np.abs(exact).max() * (1e-6 if dtype == jnp.float32 else 1e-2)
    )
    np.testing.assert_array_equal(result, linear(x, jnp.asarray(matrix, dtype)))
    assert linear(x, jnp.asarray(matrix, dtype), jnp.float32).dtype == jnp.float32


def test_whole_model_with_mxfp8_weights(weights):
    """Linears and experts in MXFP8 give what their dequantised values give; no module is another."""
    random = np.random.default_rng(1)
    quantised, wide = dict(weights), dict(weights)
    for name, leaf in weights.items():
        if leaf.ndim < 2 or name in ("embed_tokens", "lm_head") or name.endswith("gate.weight"):
            continue
        *lead, inputs, outputs = leaf.shape
        values = (random.standard_normal((*lead, outputs, inputs)) * 10).astype(ml_dtypes.float8_e4m3fn)
        scales = random.integers(119, 122, (*lead, outputs, inputs // 32)).astype(np.uint8)
        if inputs % 32:
            continue
        quantised[name] = Mxfp8.from_rows(jnp.asarray(values), jnp.asarray(scales))
        factor = 2.0 ** (np.repeat(scales.astype(np.int64), 32, axis=-1) - 127)
        wide[name] = jnp.asarray((values.astype(np.float64) * factor).swapaxes(-1, -2), jnp.float32)
    assert sum(isinstance(leaf, Mxfp8) for leaf in quantised.values()) > 15
    ids, run = tokens(64), runner()
    expected = alone(run, wide, ids)
    assert expected.std() > 0.1
    np.testing.assert_allclose(alone(run, quantised, ids), expected, atol=1e-4)


def test_comm_sees_every_routing_decision(weights, run):
    """`comm` is asked at each of its points, and the identity changes nothing."""
    calls = []

    class Counting(Comm):
        def sum_tensor(self, x):
            calls.append("sum")
            return x

        def gather_vocab(self, logits):
            calls.append("vocab")
            return logits

        def route(self, layer_id, expert_ids, weights):
            calls.append(("route", layer_id, expert_ids.shape))
            return expert_ids, weights

    graphdef, _ = split_model(abstract_model(CONFIG, jnp.float32))

    @jax.jit
    def with_comm(weights, ids):
        attend = ReferenceAttend(CONFIG, jnp.array([0, 20]), 20)
        return merge_model(graphdef, weights)(ids, jnp.arange(20), attend, Counting())

    ids = tokens(20)
    np.testing.assert_array_equal(with_comm(weights, jnp.asarray(ids)), alone(run, weights, ids))
    assert calls.count("sum") == 2 * 3 and calls.count("vocab") == 1
    assert [call for call in calls if call[0] == "route"] == [("route", 1, (20, 2)), ("route", 2, (20, 2))]


def test_many_bfloat16_rows_meet_a_float32_weight_as_accurately_as_in_float32():
    """And derivatives too, which through the weight's bfloat16 parts would be rounded."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (300, 512), jnp.bfloat16)
    w, cotangent = jax.random.normal(keys[1], (512, 16)), jax.random.normal(keys[2], (300, 16))
    found, pull_back = jax.vjp(jax.jit(linear_float32), x, w)
    wide_x, wide_w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    np.testing.assert_allclose(found, wide_x @ wide_w, atol=2e-4)
    rounded = np.asarray(x @ w.astype(jnp.bfloat16), np.float64)
    assert np.abs(rounded - wide_x @ wide_w).max() > 0.05, "one part would not do"
    dx, dw = pull_back(cotangent)
    assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    np.testing.assert_allclose(dw, wide_x.T @ np.asarray(cotangent, np.float64), atol=1e-3)
