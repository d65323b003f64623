"""Pools of pages that are written in place, resized and released."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_jax.cache.pages import CachePlacement, PagedCaches, Place, allocate_pages
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.segmented import Epoch, StaleCaptureError


@dataclasses.dataclass
class LentLayer:
    """One layer's pools while a step holds them: it leaves there what came back from the executable."""

    k: Float[Array, "P Hkv B D"]
    v: Float[Array, "P Hkv B D"]
    index: Float[Array, "P B Di"] | None


@dataclasses.dataclass
class LentCaches:
    """All layers' pools while a step holds them, as `LentLayer`."""

    caches: PagedCaches


class PagePool:
    """The current page pools of a model. Whoever donates one to a kernel borrows it for the launch.

    Attributes:
      epoch: advances when the pools are resized or released; captured calls watch it.
      num_pages: pages of every layer's pools; 0 after `release` and a failed `resize`.
    """

    def __init__(
        self,
        config: MiniMaxM3Config,
        num_pages: int,
        dtype: DTypeLike,
        device: Place = None,
    ):
        """Allocates `num_pages` pages of zeros; over a mesh with data ranks, so many on each.

        Raises:
          ValueError: for fewer than one page.
        """
        self.epoch = Epoch()
        self._config, self._dtype, self._device = config, jnp.dtype(dtype), device
        self._lock, self._lent = threading.RLock(), False
        self.num_pages = _checked(num_pages)
        self._set(allocate_pages(config, num_pages, dtype, device))

    def _set(self, caches: PagedCaches) -> None:
        self._k, self._v, self._index = list(caches.k), list(caches.v), list(caches.index)

    @property
    def caches(self) -> PagedCaches:
        """All pools, to look at; a step that donates them takes them by `borrow`.

        Raises:
          StaleCaptureError: after `release`.
        """
        with self._lock:
            self._check_held()
            return PagedCaches(tuple(self._k), tuple(self._v), tuple(self._index))

    @contextlib.contextmanager
    def borrow_layer(self, layer_id: int, life: int) -> Iterator[LentLayer]:
        """Lends one layer's pools to a step that donates them, and takes back what lies in the loan at the end.

        Nobody resizes, releases or borrows meanwhile, so hold it for a launch only, which waits for no device.

        Args:
          life: the epoch's value that the caller's plans were made for.

        Raises:
          StaleCaptureError: if the pools were resized or released since.
        """
        with self._lending():
            self.epoch.check(life, f"the attention of layer {layer_id}")
            self._check_held()
            lent = LentLayer(self._k[layer_id], self._v[layer_id], self._index[layer_id])
            yield lent
            self._k[layer_id], self._v[layer_id], self._index[layer_id] = lent.k, lent.v, lent.index

    @contextlib.contextmanager
    def borrow(self) -> Iterator[LentCaches]:
        """All layers' pools, as `borrow_layer`, in whatever life is the current one."""
        with self._lending():
            lent = LentCaches(self.caches)
            yield lent
            self._set(lent.caches)

    @contextlib.contextmanager
    def _lending(self) -> Iterator[None]:
        with self._lock:
            self._check_not_lent()
            self._lent = True
            try:
                yield
            finally:
                self._lent = False

    def store(self, caches: PagedCaches, life: int) -> None:
        """Takes back all pools after a step that was given `caches`; raises as `borrow_layer`.

        Where others may resize between taking and storing, use `borrow`.
        """
        with self._lock:
            self.epoch.check(life, "the caches of this step")
            self._set(caches)

    def resize(self, num_pages: int, *, keep: bool = True) -> None:
        """Gives every layer pools of another size; captured calls and prepared steps become stale.

        Brings a released pool back, empty.

        Args:
          keep: whether pages that exist before and after keep their contents. Layers are copied one by one, so
            one layer's pools exist twice for a moment. Without it the old pools are freed first.

        Raises:
          ValueError: for fewer than one page.
          RuntimeError: if contents are to be kept that a failed step has consumed; nothing has changed then.

        If the device has no room, its error goes on to the caller. A pool that grew with `keep` is as before then,
        in any other case it is empty, as after `release`.
        """
        _checked(num_pages)
        with self._lock:
            self._check_not_lent()
            if not keep or not self.num_pages:
                self.release()
                self._set(allocate_pages(self._config, num_pages, self._dtype, self._device))
                self.num_pages = num_pages
                return
            if any(pool is not None and pool.is_deleted() for pool in (*self._k, *self._v, *self._index)):
                raise RuntimeError("keep = True: a failed step has consumed pages, resize with keep = False")
            self.epoch.advance()
            before, self.num_pages = self.num_pages, num_pages
            try:
                for layer_id in range(len(self._k)):
                    self._resize_layer(layer_id)
            except Exception:
                self._undo_resize(before)
                raise

    def _resize_layer(self, layer_id: int) -> None:
        old = self._k[layer_id], self._v[layer_id], self._index[layer_id]
        before, after = old[0].shape[0] // self._groups, self.num_pages
        if before == after:
            return
        # all of a layer's before any is replaced: a failure leaves no layer in halves
        k, v = _resized(old[0], before, after), _resized(old[1], before, after)
        index = None if old[2] is None else _resized(old[2], before, after)
        self._k[layer_id], self._v[layer_id], self._index[layer_id] = k, v, index
        for pool in old:
            if pool is not None:
                pool.delete()

    @property
    def _groups(self) -> int:
        """Data ranks, whose pools lie one after the other in one array."""
        return self._device.groups if isinstance(self._device, CachePlacement) else 1

    def _undo_resize(self, before: int) -> None:
        grew, self.num_pages = before < self.num_pages, before
        try:
            for layer_id in range(len(self._k) if grew else 0):
                self._resize_layer(layer_id)
        except (jax.errors.JaxRuntimeError, MemoryError):
            grew = False
        if not grew:  # the pages that were cut off are lost
            self.release()

    def release(self) -> None:
        """Frees all pools now, whoever still refers to them; a second call does nothing."""
        with self._lock:
            self._check_not_lent()
            if self.num_pages:
                self.epoch.advance()
                self.num_pages = 0
                self._delete()

    def _delete(self) -> None:
        for pool in (*self._k, *self._v, *self._index):
            if pool is not None and not pool.is_deleted():
                pool.delete()
        self._k, self._v, self._index = [], [], []

    def _check_held(self) -> None:
        if not self.num_pages:
            raise StaleCaptureError(
                "the page pool has no pages: it was released, or a resize failed; resize it or make a new one"
            )

    def _check_not_lent(self) -> None:
        """The lock keeps other threads out; this finds the borrower itself."""
        if self._lent:
            raise RuntimeError("the page pool is lent to a step of this very thread: end the step first")


def _resized(old: Array, before: int, after: int) -> Array:
    """A pool with other pages; pools of several data ranks lie one after the other."""
    return _fitting(before, after, old.sharding if old.committed else None)(old)


@functools.lru_cache(maxsize=16)
def _fitting(before: int, after: int, sharding: jax.sharding.Sharding | None) -> Callable[[Array], Array]:
    """Cuts off pages or appends zeros, without a copy in between."""

    def fit(old: Array) -> Array:
        groups = old.reshape(old.shape[0] // before, before, *old.shape[1:])[:, :after]
        if after > before:
            groups = jnp.pad(groups, [(0, 0), (0, after - before)] + [(0, 0)] * (old.ndim - 1))
        return groups.reshape(-1, *old.shape[1:])

    return jax.jit(fit, out_shardings=sharding)


def _checked(num_pages: int) -> int:
    if num_pages < 1:
        raise ValueError(f"num_pages = {num_pages}: must be at least 1")
    return num_pages
