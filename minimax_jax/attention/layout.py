"""Where the tokens of one step stand: in which request, at which position, in which page."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """The requests of one step on the host, at their exact sizes.

    Attributes:
      block_tables: [R, N] int32 pages of each request; entries past its context may hold anything.
      query_starts: [R + 1] int32 boundaries of the requests in the flat tokens.
      kv_lens: [R] int32 tokens of context, the step's own included.
      slots: [T] int32 page * B + offset of each token, -1 to write nothing.
    """

    block_tables: Int[np.ndarray, "R N"]
    query_starts: Int[np.ndarray, "R+1"]
    kv_lens: Int[np.ndarray, "R"]
    slots: Int[np.ndarray, "T"]

    @property
    def num_tokens(self) -> int:
        """T, live tokens."""
        return int(self.query_starts[-1])


def step_layout(
    block_tables: Int[np.ndarray, "R N"],
    query_lens: Int[np.ndarray, "R"],
    kv_lens: Int[np.ndarray, "R"],
    block_size: int,
) -> StepLayout:
    """Lays requests out one after the other; each writes its last `query_lens` tokens to its own pages.

    Raises:
      ValueError: if a request's new tokens exceed its context, or its context its pages.
    """
    query_lens, kv_lens = np.asarray(query_lens, np.int32), np.asarray(kv_lens, np.int32)
    if (query_lens > kv_lens).any():
        raise ValueError(f"query_lens = {query_lens.tolist()}: must be at most kv_lens = {kv_lens.tolist()}")
    if kv_lens.size and kv_lens.max() > block_tables.shape[1] * block_size:
        raise ValueError(
            f"kv_lens has {kv_lens.max()} tokens: must be at most {block_tables.shape[1] * block_size}, what "
            f"block_tables of {block_tables.shape[1]} pages of {block_size} tokens hold"
        )
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    request = np.repeat(np.arange(len(query_lens)), query_lens)
    positions = np.arange(starts[-1]) - starts[request] + (kv_lens - query_lens)[request]
    slots = block_tables[request, positions // block_size] * block_size + positions % block_size
    return StepLayout(np.asarray(block_tables, np.int32), starts, kv_lens, slots.astype(np.int32))


def check_pages(pages: Int[np.ndarray, "..."], num_pages: int) -> None:
    """Raises ValueError if a page that tables name is not in a pool of `num_pages`."""
    if pages.size and not 0 <= pages.min() <= pages.max() < num_pages:
        raise ValueError(
            f"block_tables name pages {pages.min()}..{pages.max()}: must be within 0..{num_pages - 1}, the pool's"
        )
