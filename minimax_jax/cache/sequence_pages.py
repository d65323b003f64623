"""The pages of one sequence: found by content, grown, copied before a write that others would see, registered."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from minimax_jax.cache.page_allocator import PageAllocator
from minimax_jax.cache.page_hash import extend_hashes


class SequencePages:
    """The block table of one sequence, on the host.

    Attributes:
      table: its pages, in order.
      num_found: how many of the first ones came from `find` or `share`, written by somebody else.
    """

    def __init__(self, allocator: PageAllocator, page_size: int):
        self._allocator, self._page_size = allocator, page_size
        self.table: list[int] = []
        self.num_found = 0
        self._hashes: list[bytes] = []
        self._num_registered = 0

    def find(self, tokens: Int[np.ndarray, "L"]) -> int:
        """Takes the pages that hold the beginning of `tokens` already; returns the tokens on them.

        At least the last token is left to compute, since its logits are wanted. The table must be empty.
        """
        assert not self.table
        extend_hashes(self._hashes, tokens, self._page_size)
        most = (len(tokens) - 1) // self._page_size
        self.table = self._allocator.lookup(self._hashes[:most])
        self.num_found = self._num_registered = len(self.table)
        return self.num_found * self._page_size

    def count_reuse(self, tokens: Int[np.ndarray, "L"]) -> None:
        """Enters into the books what `find` gave a sequence that has now started."""
        self._allocator.counts.asked += (len(tokens) - 1) // self._page_size
        self._allocator.counts.found += self.num_found

    def share(self, other: SequencePages, num_tokens: int) -> None:
        """Takes the pages of another sequence up to `num_tokens` tokens, a partly filled last one included."""
        assert not self.table
        self.table = other.table[: -(-num_tokens // self._page_size)]
        for page in self.table:
            self._allocator.retain(page)
        self._hashes = other._hashes[: num_tokens // self._page_size]
        self.num_found = len(self.table)
        self._num_registered = min(other._num_registered, num_tokens // self._page_size)

    def pages_missing(self, num_tokens: int) -> int:
        """Pages to add before there is room for `num_tokens` tokens."""
        return max(0, -(-num_tokens // self._page_size) - len(self.table))

    def pages_needed(self, first: int, end: int) -> int:
        """Pages that `grow` would take."""
        return self.pages_missing(end) + self._copies(first)

    def _copies(self, first: int) -> bool:
        """Whether the page that token `first` goes to must be copied before it is written."""
        place = first // self._page_size
        if place >= len(self.table):
            return False
        # a registered page is somebody's to find, though nobody holds it yet
        return self._allocator.references(self.table[place]) > 1 or self._allocator.is_registered(self.table[place])

    def grow(self, first: int, end: int) -> list[tuple[int, int]] | None:
        """Makes room for tokens first .. end - 1, to be written.

        Returns:
          (page, copy) pairs: pages to copy on the device before the write, because others read them; None, and
          nothing changed, if there are too few pages.
        """
        place, copy = first // self._page_size, self._copies(first)
        needed = self.pages_missing(end) + copy
        if not needed:
            return []
        pages = self._allocator.allocate(needed)
        if pages is None:
            return None
        copies = []
        if copy:
            old, new = self.table[place], pages.pop()
            self.table[place] = new
            self._allocator.release([old])
            copies.append((old, new))
            self.num_found, self._num_registered = min(self.num_found, place), min(self._num_registered, place)
        self.table += pages
        return copies

    def fills_a_page(self, num_tokens: int) -> bool:
        """Whether `register` would have anything to do for so many tokens."""
        return num_tokens // self._page_size > self._num_registered

    def register(self, tokens: Int[np.ndarray, "L"]) -> None:
        """Lets later sequences find the pages that `tokens`, all of which were computed, fill."""
        full = len(tokens) // self._page_size
        if full <= self._num_registered:
            return
        extend_hashes(self._hashes, tokens[: full * self._page_size], self._page_size)
        for place in range(self._num_registered, full):
            self._allocator.register(self.table[place], self._hashes[place])
        self._num_registered = full

    def release(self) -> None:
        """Gives all pages back; registered ones may be found again."""
        self._allocator.release(self.table)
        self.table, self.num_found, self._num_registered = [], 0, 0

    def discard(self) -> list[int]:
        """As `release`, but what this sequence wrote is found no more; returns the pages that nobody holds now."""
        written, found = self.table[self.num_found :], self.table[: self.num_found]
        for page in written:
            self._allocator.forget(page)
        self._allocator.release(written)
        self._allocator.release(found)
        self.table, self.num_found, self._num_registered = [], 0, 0
        return [page for page in written if self._allocator.references(page) == 0]
