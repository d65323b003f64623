"""Operands of one `msa` call on a torch device."""

from __future__ import annotations

from typing import Any

import torch

from minimax_kernels import Batch


def msa_operands(device: torch.device, *, small: bool, num_pages: int | None = None) -> tuple[dict[str, Any], Batch]:
    """(q, caches and index queries by name, batch): M3's heads in bfloat16, or a toy in float32.

    Args:
      num_pages: of the caches, at least what the batch needs; None for just that.
    """
    heads, kv_heads, dim, block, tokens, context = (4, 2, 32, 16, 24, 100) if small else (64, 4, 128, 128, 64, 5000)
    dtype = torch.float32 if small else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    width = -(-context // block)
    pages = 2 * width if num_pages is None else num_pages
    tables = torch.randperm(pages, generator=generator, device=device)[: 2 * width].view(2, width).to(torch.int32)
    operands = {
        "q": normal(tokens, heads, dim),
        "k_cache": normal(pages, kv_heads, block, dim),
        "v_cache": normal(pages, kv_heads, block, dim),
        "idx_q": normal(tokens, kv_heads, dim),
        "index_cache": normal(pages, block, dim),
    }
    starts = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32, device=device)
    lens = torch.tensor([context, context - block], dtype=torch.int32, device=device)
    return operands, Batch(tables, starts, lens)


def msa_options(*, small: bool) -> dict[str, Any]:
    """The options that go with them."""
    return {"scale": (32 if small else 128) ** -0.5, "topk": 2 if small else 16}
