"""The kernels as an attention implementation of transformers' own MiniMax-M3, by its public registries.

transformers keeps keys as [R, Hkv, S, D] and selects blocks itself. A row's head is a run of pages here: one request
for each row and KV head, with one KV head each, so that a cache whose S is a whole number of pages is read where it
lies. Other lengths are copied into pages, of a bucketed number, so that few shapes are ever compiled.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minimax_jax.buckets import bucket
from minimax_jax.torch.ops import dense_attention, sparse_attention
from minimax_kernels import Batch

IMPLEMENTATION = "minimax_jax"


def register_attention() -> None:
    """Makes `attn_implementation="minimax_jax"` known to transformers; a second call changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, minimax_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, context_lengths)


def patch_transformers(model: Any) -> Any:
    """Makes a MiniMax-M3 of transformers attend with these kernels: Pallas on CUDA, the reference on a CPU.

    For inference: a call that needs a gradient through attention is a ValueError. The vision tower keeps its own
    attention. Undo it with `model.set_attn_implementation("sdpa")`.

    Args:
      model: a `MiniMaxM3VLForCausalLM`, `MiniMaxM3SparseForConditionalGeneration`, or what they are made of.

    Returns:
      The same model.

    Raises:
      ValueError: for another model.
    """
    import transformers

    text = getattr(transformers, "MiniMaxM3VLTextModel", None)
    if text is None:
        raise ValueError(f"transformers {transformers.__version__} has no MiniMax-M3: must be 5.17 or newer")
    if not isinstance(model, torch.nn.Module) or not any(isinstance(part, text) for part in model.modules()):
        raise ValueError(f"model is {type(model).__name__}: must be a MiniMax-M3 of transformers")
    register_attention()
    within = "text_config" in getattr(model.config, "sub_configs", {})
    model.set_attn_implementation({"text_config": IMPLEMENTATION} if within else IMPLEMENTATION)
    return model


def context_lengths(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **kwargs: Any,
) -> Int[Tensor, "R 1 1 1"] | Bool[Tensor, "R 1 L S"]:
    """What the kernels need of a causal mask, in the signature of transformers' mask registry.

    Returns:
      [R, 1, 1, 1] int32 tokens of context, the new ones included, if each token sees all before it in its row
      (padding on the right is seen by no token). Else transformers' own mask, [R, 1, L, S] bool.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    mask_function = mask_function or causal_mask_function
    plain = mask_function is causal_mask_function and kv_offset == 0
    if plain and attention_mask is not None:
        kept = attention_mask[:, :kv_length].to(torch.bool)
        plain = bool((kept[:, 1:] <= kept[:, :-1]).all())  # one look at the device a forward pass
    if plain:
        length = torch.as_tensor(q_offset + q_length, dtype=torch.int32, device=device)
        return length.reshape(1, 1, 1, 1).expand(batch_size, 1, 1, 1)  # transformers takes 4 axes as ready-made
    kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )


def minimax_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "R Hq L D"],
    key: Float[Tensor, "R Hkv S D"],
    value: Float[Tensor, "R Hkv S D"],
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    block_indices: Int[Tensor, "R Hi L k"] | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "R L Hq D"], None]:
    """Attention in the signature of transformers' registry.

    Args:
      module: the attention layer, for its configuration.
      query: of the new tokens; key, value: S may exceed the context.
      attention_mask: from `context_lengths`.
      block_indices: selected blocks, -1 for none; None on dense layers.

    Returns:
      What was attended to, and no attention weights.

    Raises:
      ValueError: for dropout, or an operand that needs a gradient.
    """
    if dropout:
        raise ValueError(f"dropout = {dropout}: must be 0 with attn_implementation = {IMPLEMENTATION!r}")
    if attention_mask is None:  # a layer that is called by itself
        attention_mask = torch.full((query.shape[0],), key.shape[2], dtype=torch.int32, device=query.device)
    if attention_mask.dtype != torch.int32 or attention_mask.numel() != query.shape[0]:
        return _masked(module, query, key, value, attention_mask, scaling, block_indices, **kwargs)
    rows, kv_heads, tokens = query.shape[0], key.shape[1], query.shape[2]
    block_size = module.config.index_block_size
    k_pages, v_pages = _pages(key, block_size), _pages(value, block_size)
    requests = rows * kv_heads
    starts = torch.arange(requests + 1, dtype=torch.int32, device=query.device) * tokens
    tables = torch.arange(k_pages.shape[0], dtype=torch.int32, device=query.device).view(requests, -1)
    batch = Batch(tables, starts, attention_mask.flatten().repeat_interleave(kv_heads))
    total, size = requests * tokens, bucket(requests * tokens)
    q = query.new_zeros((size, query.shape[1] // kv_heads, query.shape[3]))
    grouped = query.unflatten(1, (kv_heads, -1)).transpose(2, 3)  # [R, Hkv, L, G, D]
    q[:total].unflatten(0, (rows, kv_heads, tokens)).copy_(grouped)
    if block_indices is None:
        attended = dense_attention(q, k_pages, v_pages, batch, scale=scaling)
    else:
        selected = _selected(block_indices, kv_heads, size, module.config.index_topk_blocks)
        attended = sparse_attention(q, k_pages, v_pages, selected, batch, scale=scaling)
    attended = attended[:total].unflatten(0, (rows, kv_heads, tokens))
    return attended.permute(0, 2, 1, 3, 4).flatten(2, 3).contiguous(), None


def _pages(cache: Float[Tensor, "R Hkv S D"], block_size: int) -> Float[Tensor, "R*Hkv*N 1 B D"]:
    """Rows' heads as runs of N pages, N bucketed: a view if S is N pages, else a copy."""
    rows, heads, length, channels = cache.shape
    pages = bucket(-(-length // block_size))
    if length != pages * block_size or not cache.is_contiguous():
        padded = cache.new_zeros((rows, heads, pages * block_size, channels))
        padded[:, :, :length] = cache
        cache = padded
    return cache.view(rows * heads * pages, 1, block_size, channels)


def _selected(
    block_indices: Int[Tensor, "R Hi L k"], kv_heads: int, size: int, topk: int
) -> Int[Tensor, "parts T topk"]:
    """Selections for `sparse_attention`: a part for each index head of a KV head."""
    rows, index_heads, tokens, found = block_indices.shape
    if index_heads < kv_heads:
        block_indices = block_indices.repeat_interleave(kv_heads // index_heads, dim=1)
    by_head = block_indices.unflatten(1, (kv_heads, -1)).permute(2, 0, 1, 3, 4).flatten(1, 3)
    selected = torch.full((by_head.shape[0], size, topk), -1, dtype=torch.int32, device=block_indices.device)
    selected[:, : rows * kv_heads * tokens, :found] = by_head.to(torch.int32)
    return selected


def _masked(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, block_indices: Any, **kwargs: Any
) -> tuple[Any, None]:
    """transformers' sdpa, for masks that are no matter of lengths."""
    from transformers import AttentionInterface

    warnings.warn(
        "attention falls back to transformers' 'sdpa': the kernels serve causal attention without padding or with "
        "padding on the right, and this mask (padding on the left, packed sequences) says more",
        stacklevel=2,
    )
    if block_indices is not None:
        positions = kwargs.get("position_ids")
        if positions is not None:
            positions = positions.expand(query.shape[0], -1)
        mask = module.indexer.build_block_mask(block_indices, mask, key.shape[2], query.dtype, query.device, positions)
    return AttentionInterface()["sdpa"](module, query, key, value, mask, scaling=scaling, **kwargs)
