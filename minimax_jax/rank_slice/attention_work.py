"""How many blocks and keys block-sparse attention has to look at, counted."""

from __future__ import annotations

BLOCK, TOPK = 128, 16  # MiniMax-M3's


def visible_blocks(query_len: int, prefix: int, block: int = BLOCK) -> int:
    """Blocks that the tokens at prefix .. prefix + query_len - 1 see, summed."""
    return _blocks_below(prefix + query_len, block) - _blocks_below(prefix, block)


def selected_keys(query_len: int, prefix: int, topk: int = TOPK, block: int = BLOCK) -> int:
    """Keys that those tokens attend to, summed: topk blocks, the last of them the token's own up to itself."""
    return _keys_below(prefix + query_len, topk, block) - _keys_below(prefix, topk, block)


def causal_keys(query_len: int, prefix: int) -> int:
    """Keys that those tokens attend to where attention is dense, summed."""
    return query_len * prefix + query_len * (query_len + 1) // 2


def _blocks_below(tokens: int, block: int) -> int:
    whole, rest = divmod(tokens, block)
    return block * whole * (whole + 1) // 2 + rest * (whole + 1)


def _keys_below(tokens: int, topk: int, block: int) -> int:
    """Sum over positions p < tokens of min(p + 1, (topk - 1) * block + p % block + 1)."""
    dense = min(tokens, topk * block)  # up to here every key is selected
    keys = dense * (dense + 1) // 2
    whole, rest = divmod(tokens - dense, block)
    base = (topk - 1) * block
    return keys + whole * (base * block + block * (block + 1) // 2) + rest * base + rest * (rest + 1) // 2
