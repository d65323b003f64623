"""Index scoring split over the ranks that share heads: each scores its share of the keys, for all heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minimax_jax.parallel.key_stripes import striped_batch, striped_slots
from minimax_kernels import Batch, index_score, select_blocks, write_index

_NO_BLOCK = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class IndexSplit:
    """Ranks that share out index keys (`key_stripes`), for use inside `jax.shard_map`.

    Exact: the score of a block is its best key's. A block among the `topk` best of all keys is among the `topk` best of
    the rank that keeps this key, since whatever comes before it there comes before it overall. So `topk` candidates of
    each rank hold the answer; where several name a block, the best score is the whole block's.

    Attributes:
      axes: of the mesh, along which the ranks stand; each has more than one rank.
      size: ranks, a divisor of the page size.
      num_heads: index heads of all ranks together.
    """

    axes: tuple[str, ...]
    size: int
    num_heads: int

    def write(
        self,
        index_cache: Float[Array, "P B/n Di"],
        idx_k: Float[Array, "T 1 Di"],
        slots: Int[Array, "T"],
        *,
        impl: str | None = None,
    ) -> Float[Array, "P B/n Di"]:
        """`write_index` for the keys that are this rank's; `slots` are those of whole pages."""
        rank = jax.lax.axis_index(self.axes)
        own = striped_slots(slots, rank, self.size, index_cache.shape[1] * self.size)
        return write_index(index_cache, idx_k, own, impl=impl)

    def select(
        self,
        idx_q: Float[Array, "T Hi Di"],
        index_cache: Float[Array, "P B/n Di"],
        batch: Batch,
        *,
        topk: int,
        init_blocks: int = 0,
        local_blocks: int = 1,
        impl: str | None = None,
    ) -> Int[Array, "Hi T topk"]:
        """What `select_blocks` gives for this rank's heads over the keys of all ranks.

        Args:
          idx_q: of this rank's heads, Hi of them.
          index_cache: this rank's keys.
          batch: over whole pages.
        """
        num_tokens = idx_q.shape[0]
        rank = jax.lax.axis_index(self.axes)
        striped = striped_batch(batch, num_tokens, rank, self.size)
        queries = self._all_heads(idx_q)
        if striped.order is not None:
            queries = queries[striped.order]
        scores = index_score(queries, index_cache, striped.batch, impl=impl)
        own_blocks = striped.positions // (index_cache.shape[1] * self.size)
        ranked = ranked_scores(scores, own_blocks, init_blocks=init_blocks, local_blocks=local_blocks)
        most = min(topk, batch.num_blocks)
        blocks = select_blocks(ranked, striped.batch, topk=most, init_blocks=0, local_blocks=0, impl=impl)
        best = scores_of(ranked, blocks)
        if striped.order is not None:
            back = jnp.argsort(striped.order)
            blocks, best = blocks[:, back], best[:, back]
        return merged_blocks(*self._exchange(best, blocks), topk=topk)

    def _all_heads(self, idx_q: Float[Array, "T Hi Di"]) -> Float[Array, "T Ha Di"]:
        """The queries of all index heads; of ranks that share one, the first's."""
        gathered = jax.lax.all_gather(idx_q, self.axes, axis=1)
        return gathered[:, :: self._sharing].reshape(idx_q.shape[0], self.num_heads, -1)

    def _exchange(
        self, best: Float[Array, "Ha T k"], blocks: Int[Array, "Ha T k"]
    ) -> tuple[Float[Array, "Hi T n*k"], Int[Array, "Hi T n*k"]]:
        """Every rank's candidates for this rank's heads, from this rank's for all heads."""
        both = jnp.stack([jax.lax.bitcast_convert_type(best, jnp.int32), blocks], axis=1)
        to_ranks = jnp.repeat(both, self._sharing, axis=0).reshape(self.size, -1, *both.shape[1:])
        received = jnp.moveaxis(jax.lax.all_to_all(to_ranks, self.axes, split_axis=0, concat_axis=0), 0, 3)
        joined = received.reshape(*received.shape[:3], -1)  # [Hi, 2, T, n * k]
        return jax.lax.bitcast_convert_type(joined[:, 0], jnp.float32), joined[:, 1]

    @property
    def _sharing(self) -> int:
        """Ranks that have the same index head."""
        return max(1, self.size // self.num_heads)


def ranked_scores(
    scores: Float[Array, "H T N"], own_blocks: Int[Array, "T"], *, init_blocks: int, local_blocks: int
) -> Float[Array, "H T N"]:
    """Scores of some keys of each block as plain numbers in the order in which `select_blocks` takes blocks.

    Forced blocks get the greatest number; NaN, which is above it, stays, and so does the -inf of no visible key.

    Args:
      own_blocks: the block that each token itself is in.
    """
    blocks, own = jnp.arange(scores.shape[2]), own_blocks[:, None]
    forced = (blocks <= own) & ((blocks < init_blocks) | (blocks > own - local_blocks))
    most = jnp.finfo(scores.dtype).max
    numbers = jnp.where(scores > most, most, jnp.where(scores == 0, 0, scores))  # zeros of both signs are equal
    return jnp.where((scores != -jnp.inf) & forced, most, numbers)


def scores_of(ranked: Float[Array, "H T N"], blocks: Int[Array, "H T k"]) -> Float[Array, "H T k"]:
    """The `ranked_scores` of chosen blocks, infinity in the place of NaN."""
    scores = jnp.take_along_axis(ranked, jnp.maximum(blocks, 0), axis=-1)
    return jnp.where(jnp.isnan(scores), jnp.inf, scores)


def merged_blocks(best: Float[Array, "H T C"], blocks: Int[Array, "H T C"], *, topk: int) -> Int[Array, "H T topk"]:
    """The `topk` best of candidates, of equal ones the lower block; -1 after them.

    Args:
      best: their `scores_of`.
      blocks: which they are, -1 for none; one may be named several times.
    """
    named = jnp.where(blocks < 0, _NO_BLOCK, blocks)
    # by block, the best of each first: then of equal scores the lower block has the lower place, as top_k wants it
    named, negative = jax.lax.sort((named, -best), dimension=-1, num_keys=2)
    again = jnp.pad(named[..., 1:] == named[..., :-1], ((0, 0), (0, 0), (1, 0)))
    scores = jnp.where(again | (named == _NO_BLOCK), -jnp.inf, -negative)
    top, places = jax.lax.top_k(scores, min(topk, blocks.shape[-1]))
    chosen = jnp.where(top != -jnp.inf, jnp.take_along_axis(named, places, axis=-1), -1)
    return jnp.pad(chosen, ((0, 0), (0, 0), (0, topk - chosen.shape[-1])), constant_values=-1)
