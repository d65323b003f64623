"""Two-phase cache sizing: run and capture over a small pool, measure, then the final pool."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from minimax_jax.cache import PagePool
from minimax_jax.parallel.processes import smallest_of_all

_PIECE_BYTES = 1 << 28


def fill_memory(
    pool: PagePool,
    warm_up: Callable[[], None],
    device: jax.Device,
    page_bytes: int,
    *,
    num_pages: int | None = None,
    most_pages: int | None = None,
    memory_fraction: float = 0.9,
) -> None:
    """Gives a small pool the size that the device has room for, warmed up before and after.

    Args:
      warm_up: runs the largest steps over the pool as it is.
      device: one of those that the pool lies on, all of which hold as much.
      page_bytes: of one page in all layers, on that device.
      num_pages: given, nothing is measured (a CPU tells no memory).
      most_pages: at most so many, None for no limit.
      memory_fraction: of the device's memory, for everything.

    Raises:
      ValueError: if the device tells no memory and `num_pages` is None, or not even one page would fit.
    """
    if num_pages is not None:
        warm_up()
    else:
        before = device.memory_stats()
        if before is None:
            raise ValueError("num_pages: must be given, this device does not tell its memory")
        # what ran earlier in this process may have left a peak that hides that of the steps
        hidden = before["peak_bytes_in_use"] - before["bytes_in_use"]
        with taken_memory(device, hidden):
            warm_up()
        memory = device.memory_stats()
        num_pages = pages_that_fit(
            memory["bytes_limit"],
            memory["peak_bytes_in_use"] - hidden,
            pool.num_pages * page_bytes,
            page_bytes,
            memory_fraction,
        )
        if most_pages is not None:
            num_pages = min(num_pages, most_pages)
        num_pages = smallest_of_all(num_pages)
    pool.resize(num_pages, keep=False)
    warm_up()


@contextlib.contextmanager
def taken_memory(device: jax.Device, num_bytes: int) -> Iterator[None]:
    """Takes so much of a device's memory meanwhile, in pieces, since free memory need not lie together."""
    pieces = []
    try:
        while num_bytes > 0:
            size = min(num_bytes, _PIECE_BYTES)
            pieces.append(jnp.zeros(size, jnp.uint8, device=device))
            num_bytes -= size
        jax.block_until_ready(pieces)
        yield
    finally:
        for piece in pieces:
            piece.delete()


def pages_that_fit(total: int, peak: int, small_pool: int, page_bytes: int, fraction: float) -> int:
    """Pages for which `fraction` of the memory has room beside everything else.

    Args:
      total: bytes of the device; peak: most bytes in use so far, those of the small pool included.

    Raises:
      ValueError: if there is no room for a page, or fraction is not within (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"memory_fraction = {fraction}: must be within (0, 1]")
    room = int(fraction * total) - (peak - small_pool)
    if room < page_bytes:
        raise ValueError(
            f"memory_fraction = {fraction}: of {total} bytes, {peak - small_pool} are taken by weights and steps, and "
            f"the rest does not hold one page of {page_bytes} bytes"
        )
    return room // page_bytes
