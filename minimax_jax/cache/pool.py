"""Pools of pages that are written in place, resized and released."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minimax_jax.cache.pages import PagedCaches, Place, allocate_pages
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.segmented import Epoch, StaleCaptureError


class PagePool:
    """The current page pools of a model. Whoever donates one to a kernel stores what comes back.

    Attributes:
      epoch: advances when the pools are resized or released; captured calls watch it.
      num_pages: pages of every layer's pools; 0 after `release`.
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
        self._lock = threading.RLock()
        self.num_pages = _checked(num_pages)
        self._set(allocate_pages(config, num_pages, dtype, device))

    def _set(self, caches: PagedCaches) -> None:
        self._k, self._v, self._index = list(caches.k), list(caches.v), list(caches.index)

    @property
    def caches(self) -> PagedCaches:
        """All pools, for a step that takes them as arguments; see `store`.

        Raises:
          StaleCaptureError: after `release`.
        """
        with self._lock:
            self._check_held()
            return PagedCaches(tuple(self._k), tuple(self._v), tuple(self._index))

    def layer(
        self, layer_id: int, life: int
    ) -> tuple[Float[Array, "P Hkv B D"], Float[Array, "P Hkv B D"], Float[Array, "P B Di"] | None]:
        """(keys, values, index keys or None) of one layer.

        Args:
          life: the epoch's value that the caller's plans were made for.

        Raises:
          StaleCaptureError: if the pools were resized or released since.
        """
        with self._lock:
            self.epoch.check(life, f"the attention of layer {layer_id}")
            self._check_held()
            return self._k[layer_id], self._v[layer_id], self._index[layer_id]

    def store_layer(
        self,
        layer_id: int,
        life: int,
        k: Float[Array, "P Hkv B D"],
        v: Float[Array, "P Hkv B D"],
        index: Float[Array, "P B Di"] | None,
    ) -> None:
        """Takes back one layer's pools after an in-place write; raises as `layer`."""
        with self._lock:
            self.epoch.check(life, f"what layer {layer_id} wrote")
            self._k[layer_id], self._v[layer_id], self._index[layer_id] = k, v, index

    def store(self, caches: PagedCaches, life: int) -> None:
        """Takes back all pools after a step that was given `caches`; raises as `layer`."""
        with self._lock:
            self.epoch.check(life, "the caches of this step")
            self._set(caches)

    def resize(self, num_pages: int, *, keep: bool = True) -> None:
        """Gives every layer pools of another size; captured calls and prepared steps become stale.

        Args:
          keep: whether pages that exist before and after keep their contents. Layers are copied one by one, so
            one layer's pools exist twice for a moment. Without it the old pools are freed first.

        Raises:
          ValueError: for fewer than one page.
        """
        _checked(num_pages)
        with self._lock:
            self._check_held()
            self.epoch.advance()
            if not keep:
                self._delete()
                self._set(allocate_pages(self._config, num_pages, self._dtype, self._device))
            else:
                for pools in (self._k, self._v, self._index):
                    for layer_id, old in enumerate(pools):
                        if old is not None:
                            pools[layer_id] = _resized(old, self.num_pages, num_pages)
                            old.delete()
            self.num_pages = num_pages

    def release(self) -> None:
        """Frees all pools now, whoever still refers to them; a second call does nothing."""
        with self._lock:
            if self.num_pages:
                self.epoch.advance()
                self._delete()
                self.num_pages = 0

    def _delete(self) -> None:
        for pool in (*self._k, *self._v, *self._index):
            if pool is not None and not pool.is_deleted():
                pool.delete()
        self._k, self._v, self._index = [], [], []

    def _check_held(self) -> None:
        if not self.num_pages:
            raise StaleCaptureError("the page pool was released: resize does not bring it back, make a new one")


def _resized(old: Array, before: int, after: int) -> Array:
    """A pool with other pages; pools of several data ranks lie one after the other."""

    def resize(old: Array) -> Array:
        groups = old.reshape(old.shape[0] // before, before, *old.shape[1:])[:, :after]
        grown = jnp.pad(groups, [(0, 0), (0, max(0, after - before))] + [(0, 0)] * (old.ndim - 1))
        return grown.reshape(-1, *old.shape[1:])

    return jax.jit(resize, out_shardings=old.sharding)(old)


def _checked(num_pages: int) -> int:
    if num_pages < 1:
        raise ValueError(f"num_pages = {num_pages}: must be at least 1")
    return num_pages
