"""Cache writes on torch tensors: torch's own scatter, in place, without a synchronisation.

These need no JAX: the tensors' owner writes them, so that autograd's version counters, streams and
`torch.compile` see an ordinary in-place write. (XLA writes foreign memory in place on no CPU.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minimax_jax.torch.tensors import CACHES, FLOATS, INTEGERS, check_operand
from minimax_kernels import checks


def write_kv(
    k_cache: Float[Tensor, "P Hkv B D"],
    v_cache: Float[Tensor, "P Hkv B D"],
    k: Float[Tensor, "T Hkv D"],
    v: Float[Tensor, "T Hkv D"],
    slots: Int[Tensor, "T"],
) -> tuple[Float[Tensor, "P Hkv B D"], Float[Tensor, "P Hkv B D"]]:
    """Writes each token's key and value to its slot, in place.

    Args:
      k_cache, v_cache: pages of B tokens.
      k, v: new keys and values; rounded to the caches' type as `minimax_kernels.write_kv` rounds.
      slots: page * B + offset of each token; one that is outside the pages, such as -1, is skipped.

    Returns:
      The two caches.

    Raises:
      ValueError: for shapes, types or devices that do not fit.
    """
    checks.check_rank("k_cache", k_cache, "[P, Hkv, B, D]")
    checks.check_rank("k", k, "[T, Hkv, D]")
    if v_cache.shape != k_cache.shape:
        raise ValueError(f"v_cache has shape {tuple(v_cache.shape)}: must be {tuple(k_cache.shape)}, as k_cache")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}: must be {tuple(k.shape)}, as k")
    checks.check_extent("k", "Hkv", k.shape[1], k_cache.shape[1], "in k_cache")
    checks.check_extent("k", "D", k.shape[2], k_cache.shape[3], "in k_cache")
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        check_operand(name, tensor, CACHES if name.endswith("_cache") else FLOATS, k_cache.device)
    _check_slots(slots, k, "k")
    _write(k_cache, k, slots)
    _write(v_cache, v, slots)
    return k_cache, v_cache


def write_index(
    index_cache: Float[Tensor, "P B D"],
    idx_k: Float[Tensor, "T 1 D"] | Float[Tensor, "T D"],
    slots: Int[Tensor, "T"],
) -> Float[Tensor, "P B D"]:
    """Writes each token's index key to its slot, in place; see `write_kv`."""
    checks.check_rank("index_cache", index_cache, "[P, B, D]")
    if idx_k.ndim == 3 and idx_k.shape[1] == 1:
        idx_k = idx_k[:, 0]
    checks.check_rank("idx_k", idx_k, "[T, D]")
    checks.check_extent("idx_k", "D", idx_k.shape[1], index_cache.shape[2], "in index_cache")
    check_operand("index_cache", index_cache, CACHES)
    check_operand("idx_k", idx_k, FLOATS, index_cache.device)
    _check_slots(slots, idx_k, "idx_k")
    _write(index_cache[:, None], idx_k[:, None], slots)
    return index_cache


def _check_slots(slots: Tensor, rows: Tensor, name: str) -> None:
    check_operand("slots", slots, INTEGERS, rows.device)
    checks.check_rank("slots", slots, "[T]")
    checks.check_extent("slots", "T", slots.shape[0], rows.shape[0], f"in {name}")


def _write(cache: Float[Tensor, "P H B D"], rows: Float[Tensor, "T H D"], slots: Int[Tensor, "T"]) -> None:
    """Rows that are skipped repeat the first one that is not, or write back what slot 0 holds: no mask on the host."""
    num_pages, _, block_size, _ = cache.shape
    if 0 in (*cache.shape, slots.shape[0]):
        return
    kept = (slots >= 0) & (slots < num_pages * block_size)
    one = kept.to(torch.int32).argmax(keepdim=True)
    slot = torch.where(kept.any(), slots.index_select(0, one), 0)
    if cache.dtype == torch.float8_e4m3fn:
        most = torch.finfo(cache.dtype).max
        rows = rows.clamp(-most, most)  # NaN stays NaN
    rows = rows.to(cache.dtype)
    row = torch.where(kept.any(), rows.index_select(0, one), cache[:1, :, 0])
    slots = torch.where(kept, slots, slot).to(torch.int64)
    cache[slots // block_size, :, slots % block_size] = torch.where(kept[:, None, None], rows, row)
