"""Names of full pages: pages with one name hold the keys of the same tokens after the same tokens."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int

_DIGEST_BYTES = 16  # a collision among 2**40 pages has a chance below 1e-14


def page_hash(parent: bytes, tokens: Int[np.ndarray, "B"]) -> bytes:
    """The name of a page of `tokens` that follows the page named `parent` (b"" for the first of a sequence)."""
    content = parent + np.ascontiguousarray(tokens, np.int32).tobytes()
    return hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest()


def extend_hashes(hashes: list[bytes], tokens: Int[np.ndarray, "L"], page_size: int) -> None:
    """Appends the names of the pages that `tokens`, a sequence from its start, fill and `hashes` lacks."""
    for page in range(len(hashes), len(tokens) // page_size):
        parent = hashes[-1] if hashes else b""
        hashes.append(page_hash(parent, tokens[page * page_size : (page + 1) * page_size]))
