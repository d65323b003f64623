"""Which pages of a pool are in use: reference counts, reuse by content, eviction. Host code; touches no device."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence


@dataclasses.dataclass
class ReuseCounts:
    """What reuse did so far, in pages.

    Attributes:
      asked: pages that sequences could have found when they started; found: those that were there.
      evicted: pages whose content gave way to another.
    """

    asked: int = 0
    found: int = 0
    evicted: int = 0


class PageAllocator:
    """Hands out the pages of one pool. A page stands for its keys, values and index keys in every layer.

    A page is free, referenced by one or more sequences, or idle: not referenced, but registered with the name of its
    content (`page_hash`), under which `lookup` finds it. Idle pages are evicted, the longest idle first, when no free
    one is left.

    Attributes:
      num_pages: of the pool.
      counts: of reuse.
    """

    def __init__(self, num_pages: int, *, reuse: bool = True):
        """
        Args:
          reuse: whether pages are kept for later sequences; without it `register` and `lookup` do nothing.

        Raises:
          ValueError: for fewer than one page.
        """
        if num_pages < 1:
            raise ValueError(f"num_pages = {num_pages}: must be at least 1")
        self.num_pages, self.reuse = num_pages, reuse
        self.counts = ReuseCounts()
        self._references = [0] * num_pages
        self._free = collections.deque(range(num_pages))
        self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # longest idle first
        self._name_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that `allocate` could give: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Pages that are kept for their content alone."""
        return len(self._idle)

    def references(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._references[page]

    def is_registered(self, page: int) -> bool:
        """Whether `lookup` can find the page."""
        return page in self._name_of

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each and no meaningful content; None, and nothing changed, if too few."""
        if count > self.num_available:
            return None
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._idle.popitem(last=False)
                self.forget(page)
                self.counts.evicted += 1
            self._references[page] = 1
            pages.append(page)
        return pages

    def retain(self, page: int) -> None:
        """One more reference to a page that is referenced or idle.

        Raises:
          ValueError: for a free page, whose content is nobody's.
        """
        if self._references[page] == 0:
            if page not in self._idle:
                raise ValueError(f"page {page} is free: only referenced and registered pages can be shared")
            del self._idle[page]
        self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Gives references back. Pages given first stay longest if they all become idle.

        Raises:
          ValueError: for a page without a reference.
        """
        for page in reversed(list(pages)):
            if self._references[page] == 0:
                raise ValueError(f"page {page} has no reference to give back: it was released before")
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._name_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def register(self, page: int, name: bytes) -> bool:
        """Lets `lookup` find a referenced page under its content's name; False if another page has it already."""
        if not self.reuse or name in self._page_of or page in self._name_of:
            return False
        if self._references[page] == 0:
            raise ValueError(f"page {page} has no reference: it must be registered by a sequence that holds it")
        self._name_of[page], self._page_of[name] = name, page
        return True

    def forget(self, page: int) -> None:
        """Takes a page's name away; an idle page becomes free, a referenced one stays with who holds it."""
        name = self._name_of.pop(page, None)
        if name is not None:
            del self._page_of[name]
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def forget_all(self) -> None:
        """Takes all names away: the pool's contents are lost."""
        for page in list(self._name_of):
            self.forget(page)

    def lookup(self, names: Sequence[bytes]) -> list[int]:
        """The pages of the longest run of names, from the first on, that are all there; each gets a reference."""
        found: list[int] = []
        if not self.reuse:
            return found
        for name in names:
            page = self._page_of.get(name)
            if page is None:
                break
            found.append(page)
        for page in found:
            self.retain(page)
        return found

    def check(self, held: Mapping[int, int]) -> None:
        """Raises AssertionError unless the books are in order.

        Args:
          held: references by page, as the holders themselves count them; pages left out have none.
        """
        free, idle = list(self._free), list(self._idle)
        for page, references in enumerate(self._references):
            assert references == held.get(page, 0), f"page {page}: {references} references, holders count {held}"
            places = (free.count(page), idle.count(page), int(references > 0))
            assert sum(places) == 1, f"page {page} is (free, idle, referenced) {places} times: must be one of them"
        assert all(page in self._name_of for page in idle), "an idle page has no name"
        assert not any(page in self._name_of for page in free), "a free page has a name"
        assert {page: name for name, page in self._page_of.items()} == self._name_of, "names and pages disagree"
