"""Each module against transformers' own, on the same weights and inputs, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from torch_pairs import pair_config, part_of, randomise, text_config, torch_model, weights_of  # noqa: E402
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as theirs  # noqa: E402

from minimax_jax.attention import ReferenceAttend  # noqa: E402
from minimax_jax.model import SINGLE_DEVICE  # noqa: E402
from minimax_jax.model.attention import Attention  # noqa: E402
from minimax_jax.model.minimax_m3 import DecoderLayer, merge_model, split_model  # noqa: E402
from minimax_jax.model.mlp import MLP  # noqa: E402
from minimax_jax.model.moe import Experts, MoE, Router  # noqa: E402
from minimax_jax.model.norm import RMSNorm  # noqa: E402
from minimax_jax.model.rope import rope_tables  # noqa: E402
from minimax_kernels.norm_rope.reference import rotate  # noqa: E402

TOLERANCE = 1e-5
TOKENS = 150
CONFIG = pair_config(num_local_experts=8)
LAYERS = {"dense": 0, "sparse": 1}


def assert_close(ours: Any, expected: Any) -> None:
    """Within 1e-5 of the values' own scale."""
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    assert np.isfinite(ours).all()
    assert np.abs(ours - expected).max() <= TOLERANCE * max(np.abs(expected).max(), 1e-3)


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def of_torch(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A torch module's result for NumPy inputs."""
    with torch.no_grad():
        return module(*map(torch.tensor, args), **kwargs)


def with_weights(make: Any, weights: dict[str, Any]) -> Any:
    """Our module, built as it is, with the given weights put in."""
    graphdef, own = split_model(nnx.eval_shape(make))
    assert {n: v.shape for n, v in own.items()} == {n: v.shape for n, v in weights.items()}
    return merge_model(graphdef, weights)


@pytest.fixture(scope="module")
def pair():
    model = torch_model(CONFIG)
    return model, weights_of(model, CONFIG)


def our_part(make: Any, pair: Any, prefix: str) -> Any:
    return with_weights(make, part_of(pair[1], prefix))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm(scale, eps):
    module = theirs.MiniMaxM3VLRMSNorm(48, eps=eps)
    randomise(module)
    x = normal(7, 3, 48, scale=scale)
    ours = with_weights(lambda: RMSNorm(48, eps, jnp.float32), {"weight": jnp.asarray(module.weight.detach().numpy())})
    assert_close(ours(jnp.asarray(x)), of_torch(module, x))


def test_rms_norm_of_zeros_and_in_bfloat16():
    module = theirs.MiniMaxM3VLRMSNorm(48)
    randomise(module)
    weight = jnp.asarray(module.weight.detach().numpy())
    ours = with_weights(lambda: RMSNorm(48, 1e-6, jnp.float32), {"weight": weight})
    assert not np.asarray(ours(jnp.zeros((2, 48)))).any()
    x = torch.tensor(normal(40, 48)).to(torch.bfloat16)
    expected = of_torch(module.to(torch.bfloat16), x.float().numpy())  # float32 in, weights in bfloat16
    narrow = with_weights(lambda: RMSNorm(48, 1e-6, jnp.bfloat16), {"weight": weight.astype(jnp.bfloat16)})
    result = narrow(jnp.asarray(x.float().numpy(), jnp.bfloat16))
    assert result.dtype == jnp.bfloat16
    rounded = expected.to(torch.bfloat16).float().numpy()  # all in float32, one rounding at the end
    np.testing.assert_array_equal(np.asarray(result, np.float32), rounded)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(("head_dim", "rotary_dim", "theta"), [(128, 64, 5e6), (64, 32, 5e6), (64, 64, 1e4)])
def test_rope_up_to_a_million_positions(head_dim, rotary_dim, theta, jitted):
    config = pair_config(head_dim=head_dim, rotary_dim=rotary_dim, rope_theta=theta, index_head_dim=128)
    random = np.random.default_rng(0).integers(0, 1_048_576, 200)
    positions = np.concatenate([np.arange(40), 2 ** np.arange(20), random, [524287, 524288, 1048574, 1048575]])
    q, k = normal(len(positions), 3, head_dim), normal(len(positions), 1, head_dim, seed=1)
    tables = (jax.jit(rope_tables, static_argnums=(1, 2)) if jitted else rope_tables)(
        jnp.asarray(positions), theta, rotary_dim
    )
    cos, sin = theirs.MiniMaxM3VLRotaryEmbedding(text_config(config))(torch.zeros(1), torch.tensor(positions)[None])
    assert_close(tables.cos, cos[0, :, : rotary_dim // 2])
    assert_close(tables.sin, sin[0, :, : rotary_dim // 2])
    turn = [torch.tensor(x)[None].transpose(1, 2) for x in (q, k)]
    for ours, expected in zip((q, k), theirs.apply_rotary_pos_emb(*turn, cos, sin), strict=True):
        assert_close(rotate(jnp.asarray(ours), *tables), expected[0].transpose(0, 1))


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_swigluoai_mlp_within_and_beyond_the_clamps(pair, scale):
    x = normal(60, CONFIG.hidden_size, scale=scale)
    module = pair[0].model.layers[0].mlp
    gate, up = of_torch(module.gate_up_proj, x).chunk(2, dim=-1)
    clamped = [(gate > 7).any(), (up > 7).any(), (up < -7).any()]
    assert all(clamped) if scale > 1 else not any(clamped)
    ours = our_part(
        lambda: MLP(CONFIG, CONFIG.dense_intermediate_size, jnp.float32, nnx.Rngs(0)), pair, "layers.0.mlp."
    )
    assert_close(ours(jnp.asarray(x)), of_torch(module, x))


def test_router_ids_and_weights(pair):
    module, x = pair[0].model.layers[1].mlp.gate, normal(200, CONFIG.hidden_size)
    _, weights, ids = of_torch(module, x)
    ours_ids, ours_weights = our_part(lambda: Router(CONFIG, nnx.Rngs(0)), pair, "layers.1.mlp.gate.")(jnp.asarray(x))
    assert ours_weights.dtype == jnp.float32
    order, theirs_order = np.argsort(ours_ids, axis=-1), np.argsort(ids.numpy(), axis=-1)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(ours_ids), order, -1), np.sort(ids.numpy(), -1))
    scaled = np.take_along_axis(weights.numpy(), theirs_order, -1) * CONFIG.routed_scaling_factor
    assert_close(np.take_along_axis(np.asarray(ours_weights), order, -1), scaled)
    np.testing.assert_allclose(ours_weights.sum(-1), CONFIG.routed_scaling_factor, rtol=1e-6)


def test_router_bias_takes_part_in_the_choice_alone(pair):
    weights = part_of(pair[1], "layers.1.mlp.gate.")
    bias = weights["e_score_correction_bias"]
    x = jnp.asarray(normal(200, CONFIG.hidden_size))

    def route(bias):
        return with_weights(lambda: Router(CONFIG, nnx.Rngs(0)), weights | {"e_score_correction_bias": bias})(x)

    ids, chosen = route(bias)
    assert (np.sort(ids, -1) != np.sort(route(jnp.zeros_like(bias))[0], -1)).any()
    shifted_ids, shifted = route(bias + 5.0)
    np.testing.assert_array_equal(ids, shifted_ids)
    np.testing.assert_array_equal(chosen, shifted)


@pytest.mark.parametrize("tokens", [1, 5, 150])
def test_experts(pair, tokens):
    x = normal(tokens, CONFIG.hidden_size)
    random = np.random.default_rng(2)
    ids = np.argsort(random.random((tokens, CONFIG.num_local_experts)), axis=-1)[:, : CONFIG.num_experts_per_tok]
    weights = random.random(ids.shape).astype(np.float32)
    ours = our_part(lambda: Experts(CONFIG, jnp.float32, nnx.Rngs(0)), pair, "layers.1.mlp.experts.")
    expected = of_torch(pair[0].model.layers[1].mlp.experts, x, ids, weights)
    assert_close(ours(jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights)), expected)


def test_experts_all_tokens_at_one(pair):
    x = normal(33, CONFIG.hidden_size)
    ids = np.broadcast_to(np.array([7, 0]), (33, 2)).copy()
    weights = np.ones((33, 2), np.float32)
    ours = our_part(lambda: Experts(CONFIG, jnp.float32, nnx.Rngs(0)), pair, "layers.1.mlp.experts.")
    expected = of_torch(pair[0].model.layers[1].mlp.experts, x, ids, weights)
    assert_close(ours(jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights)), expected)


def test_moe_block(pair):
    x = normal(TOKENS, CONFIG.hidden_size)
    ours = our_part(lambda: MoE(CONFIG, 1, jnp.float32, nnx.Rngs(0)), pair, "layers.1.mlp.")
    assert_close(ours(jnp.asarray(x), SINGLE_DEVICE), of_torch(pair[0].model.layers[1].mlp, x[None])[0])


def positions_and_mask() -> dict[str, Any]:
    """What transformers' model hands to each layer."""
    positions = torch.arange(TOKENS)[None]
    future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, TOKENS, TOKENS).masked_fill(future, torch.finfo(torch.float32).min)
    rotary = theirs.MiniMaxM3VLRotaryEmbedding(text_config(CONFIG))
    return {
        "position_embeddings": rotary(torch.zeros(1), positions),
        "attention_mask": mask,
        "position_ids": positions,
    }


def ours_context():
    tables = rope_tables(jnp.arange(TOKENS), CONFIG.rope_theta, CONFIG.rotary_dim)
    return tables, ReferenceAttend(CONFIG, jnp.array([0, TOKENS]), TOKENS)


@pytest.mark.parametrize("kind", LAYERS)
def test_attention(pair, kind):
    layer_id, x = LAYERS[kind], normal(TOKENS, CONFIG.hidden_size)
    assert CONFIG.is_sparse(layer_id) == (kind == "sparse")
    ours = our_part(
        lambda: Attention(CONFIG, layer_id, jnp.float32, nnx.Rngs(0)), pair, f"layers.{layer_id}.self_attn."
    )
    expected, _ = of_torch(pair[0].model.layers[layer_id].self_attn, x[None], **positions_and_mask())
    assert_close(ours(jnp.asarray(x), *ours_context()), expected[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_decoder_layer(pair, kind):
    layer_id, x = LAYERS[kind], normal(TOKENS, CONFIG.hidden_size)
    ours = our_part(lambda: DecoderLayer(CONFIG, layer_id, jnp.float32, nnx.Rngs(0)), pair, f"layers.{layer_id}.")
    expected = of_torch(pair[0].model.layers[layer_id], x[None], **positions_and_mask())
    assert_close(sum(ours(jnp.asarray(x), None, *ours_context(), SINGLE_DEVICE)), expected[0])
    assert_close(sum(ours(jnp.asarray(x / 4), jnp.asarray(0.75 * x), *ours_context(), SINGLE_DEVICE)), expected[0])


def test_selected_blocks_are_the_indexers(pair):
    """The ids themselves, as sets, for every token and index head of a sparse layer."""
    from minimax_jax.attention import reference
    from minimax_kernels import index_score, select_blocks, write_index

    attention = pair[0].model.layers[1].self_attn
    x, context = normal(TOKENS, CONFIG.hidden_size), positions_and_mask()
    with torch.no_grad():
        expected = attention.indexer(
            torch.tensor(x)[None], context["position_embeddings"], None, context["position_ids"]
        )[0].numpy()
    ours = our_part(lambda: Attention(CONFIG, 1, jnp.float32, nnx.Rngs(0)), pair, "layers.1.self_attn.")
    seen = {}

    class Spy(reference.ReferenceAttend):
        def __call__(self, layer_id, q, k, v, idx_q, idx_k):
            pages = jnp.zeros((self.num_pages, CONFIG.index_block_size, idx_k.shape[2]))
            scores = index_score(idx_q, write_index(pages, idx_k, self.slots), self.batch)
            seen["ids"] = select_blocks(scores, self.batch, topk=CONFIG.index_topk_blocks)
            return super().__call__(layer_id, q, k, v, idx_q, idx_k)

    ours(jnp.asarray(x), ours_context()[0], Spy(CONFIG, jnp.array([0, TOKENS]), TOKENS))
    np.testing.assert_array_equal(np.sort(seen["ids"], -1), np.sort(expected, -1))
