"""Static shapes: sizes that vary from call to call are rounded up, so that few shapes are ever compiled."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def bucket(size: int, least: int = 1) -> int:
    """The smallest power of two, or three quarters of one, that holds `size` (and is at least `least`)."""
    size = max(size, least)
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if power >= 8 and size <= power * 3 // 4 else power


def buckets_up_to(most: int, least: int = 1) -> tuple[int, ...]:
    """All sizes that `bucket` gives for 1..most; the last one is `most` itself, so that nothing beyond is padded."""
    sizes = [bucket(1, least)]
    while sizes[-1] < most:
        sizes.append(bucket(sizes[-1] + 1, least))
    return (*(size for size in sizes if size < most), most)


def padded_size(size: int, sizes: Sequence[int] | None) -> int:
    """The smallest of these ascending sizes that holds `size`; above the largest, and without any, as `bucket`."""
    place = 0 if sizes is None else bisect.bisect_left(sizes, size)
    return bucket(size) if sizes is None or place == len(sizes) else sizes[place]
