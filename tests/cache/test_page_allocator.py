"""Page bookkeeping: references, reuse by content, eviction order, copies before writes."""

import collections

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minimax_jax.cache import PageAllocator, SequencePages
from minimax_jax.cache.page_hash import extend_hashes, page_hash

PAGE = 4


def names(tokens):
    found = []
    extend_hashes(found, np.array(tokens, np.int32), PAGE)
    return found


def test_a_page_is_named_by_its_tokens_and_all_before():
    one, two = names(range(8)), names([*range(4), 9, 5, 6, 7])
    assert one[0] == two[0] and one[1] != two[1] and len(one) == 2
    assert names([7, 7, 7, 7, *range(4, 8)])[1] != one[1]  # the same page after another one
    assert page_hash(b"", np.arange(4, dtype=np.int32)) == page_hash(b"", np.arange(4))
    assert names(range(3)) == []


def test_the_longest_idle_page_is_evicted_and_a_sequence_loses_its_end_first():
    allocator = PageAllocator(4)
    first, second = (SequencePages(allocator, PAGE) for _ in range(2))
    for pages, start in ((first, 0), (second, 100)):
        pages.grow(0, 8)
        pages.register(np.arange(start, start + 8))
        pages.release()
    assert allocator.num_idle == 4
    assert allocator.allocate(1) == [1]  # first's last page
    again = SequencePages(allocator, PAGE)
    assert again.find(np.arange(9)) == 4 and again.table == [0]
    assert SequencePages(allocator, PAGE).find(np.arange(100, 109)) == 8
    again.count_reuse(np.arange(9))
    assert (allocator.counts.asked, allocator.counts.found, allocator.counts.evicted) == (2, 1, 1)


def test_at_least_one_token_is_left_to_compute():
    allocator = PageAllocator(4)
    pages = SequencePages(allocator, PAGE)
    pages.grow(0, 8)
    pages.register(np.arange(8))
    assert SequencePages(allocator, PAGE).find(np.arange(8)) == 4


def test_a_shared_last_page_is_copied_before_it_is_written():
    allocator = PageAllocator(4)
    one, two = (SequencePages(allocator, PAGE) for _ in range(2))
    one.grow(0, 6)
    two.share(one, 6)
    assert two.table == one.table and two.grow(5, 6) == [(1, 2)]
    assert (one.table, two.table) == ([0, 1], [0, 2]) and allocator.references(1) == 1
    assert one.grow(6, 7) == [] and two.grow(6, 9) == [] and two.table == [0, 2, 3]
    three = SequencePages(allocator, PAGE)
    three.share(one, 6)
    assert three.grow(5, 6) is None and three.table == [0, 1]  # no page is left for the copy
    allocator.check({0: 3, 1: 2, 2: 1, 3: 1})


def test_a_discarded_sequence_is_found_no_more():
    allocator = PageAllocator(6)
    one, two = (SequencePages(allocator, PAGE) for _ in range(2))
    one.grow(0, 4)
    one.register(np.arange(4))
    one.release()
    assert two.find(np.arange(13)) == 4
    two.grow(4, 13)
    two.register(np.arange(13))
    assert two.discard() == [1, 2, 3]
    assert SequencePages(allocator, PAGE).find(np.arange(13)) == 4  # what it had found itself stays


def test_misuse_is_named():
    with pytest.raises(ValueError, match="num_pages = 0: must be at least 1"):
        PageAllocator(0)
    allocator = PageAllocator(2)
    with pytest.raises(ValueError, match="page 0 has no reference to give back"):
        allocator.release([0])
    with pytest.raises(ValueError, match="page 1 is free"):
        allocator.retain(1)
    with pytest.raises(ValueError, match="page 1 has no reference"):
        allocator.register(1, b"name")
    (page,) = allocator.allocate(1)
    allocator.release([page])
    with pytest.raises(ValueError, match=f"page {page} has no reference to give back"):
        allocator.release([page])


def test_without_reuse_nothing_is_found():
    allocator = PageAllocator(2, reuse=False)
    pages = SequencePages(allocator, PAGE)
    pages.grow(0, 4)
    pages.register(np.arange(4))
    pages.release()
    assert allocator.num_idle == 0 and SequencePages(allocator, PAGE).find(np.arange(5)) == 0


class Sequences(RuleBasedStateMachine):
    """Sequences over few tokens, so that they meet; a page is written only by its one holder."""

    def __init__(self):
        super().__init__()
        self.allocator = PageAllocator(7)
        self.live = []  # (pages, tokens)
        self.content = {}  # (page, offset) -> the tokens up to there

    def write(self, pages, tokens, first):
        for position in range(first, len(tokens)):
            page = pages.table[position // PAGE]
            assert self.allocator.references(page) == 1 and not self.allocator.is_registered(page)
            self.content[page, position % PAGE] = tuple(tokens[: position + 1])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=13))
    def begin(self, tokens):
        pages = SequencePages(self.allocator, PAGE)
        found = pages.find(np.array(tokens))
        if pages.grow(found, len(tokens)) is None:
            pages.release()
            return
        self.write(pages, tokens, found)
        self.live.append((pages, tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fork(self, data):
        parent, tokens = data.draw(st.sampled_from(self.live))
        child = SequencePages(self.allocator, PAGE)
        child.share(parent, len(tokens))
        copies = child.grow(len(tokens) - 1, len(tokens))
        if copies is None:
            child.release()
            return
        for old, new in copies:
            for offset in range(PAGE):
                self.content[new, offset] = self.content.get((old, offset))
        self.write(child, tokens, len(tokens) - 1)
        self.live.append((child, list(tokens)))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def extend(self, data, more):
        pages, tokens = data.draw(st.sampled_from(self.live))
        before = list(pages.table)
        if pages.grow(len(tokens), len(tokens) + len(more)) is None:
            assert pages.table == before
            return
        tokens += more
        self.write(pages, tokens, len(tokens) - len(more))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def register(self, data):
        pages, tokens = data.draw(st.sampled_from(self.live))
        pages.register(np.array(tokens))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), how=st.sampled_from(["release", "discard"]))
    def end(self, data, how):
        entry = data.draw(st.sampled_from(self.live))
        getattr(entry[0], how)()
        self.live.remove(entry)

    @invariant()
    def books_are_in_order_and_pages_hold_what_they_should(self):
        self.allocator.check(collections.Counter(page for pages, _ in self.live for page in pages.table))
        for pages, tokens in self.live:
            for position in range(len(tokens)):
                held = self.content[pages.table[position // PAGE], position % PAGE]
                assert held == tuple(tokens[: position + 1])


Sequences.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestSequences = Sequences.TestCase
