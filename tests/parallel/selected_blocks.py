"""The blocks that a model's own compiled steps attend to, by rank and sparse layer."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from minimax_jax.attention import paged
from minimax_jax.parallel.config import AXES, REQUESTS
from minimax_kernels.sparse_attention import reference as sparse_reference


class SelectedBlocks:
    """[KV heads of a rank, T, topk] of each call, in the order in which calls were traced."""

    def __init__(self):
        self._calls, self._found = itertools.count(), {}

    def recording(self, attend):
        """Sparse attention that also keeps what was selected for it; on one device its rank is 0."""

        def recorded(q, k_cache, v_cache, selected, *args, **options):
            try:
                rank = jax.lax.axis_index(AXES)
            except NameError:
                rank = 0
            number = next(self._calls)
            assert k_cache.shape[0] < 128
            # in 8 bits: the copy of 100 KB or more would wait for threads that wait for this rank in a collective
            small = selected.astype(jnp.int8)
            jax.debug.callback(lambda rank, selected: self._add(number, rank, selected), rank, small)
            return attend(q, k_cache, v_cache, selected, *args, **options)

        return recorded

    def _add(self, number, rank, selected):
        self._found[number, int(rank)] = np.asarray(selected)

    def during(self, run):
        """(what one program gives, its blocks by rank and layer), whatever ran before."""
        jax.effects_barrier()
        self._found.clear()
        result = jax.block_until_ready(run())
        jax.effects_barrier()
        found = {}
        for number, rank in sorted(self._found):
            found.setdefault(rank, []).append(self._found[number, rank])
        return result, found


@contextlib.contextmanager
def recorded_blocks():
    """`SelectedBlocks` of what is compiled in here, wherever it runs."""
    found = SelectedBlocks()
    with contextlib.ExitStack() as patches:
        for module in (sparse_reference, paged):  # by msa, and where ranks share out index keys
            attend = module.sparse_attention
            patches.callback(setattr, module, "sparse_attention", attend)
            module.sparse_attention = found.recording(attend)
        yield found


def other_rows(expected, found, layout, lengths, rows):
    """(rows compared, rows of them in which ranks attend to other blocks than one device).

    Args:
      expected: of one device, by layer, its tokens those of all requests one after the other.
      found: by rank, whose tokens are those of its data rank's requests, then padding.
      lengths: of the requests; rows: requests of each data rank, in their order.
    """
    sparse = next(i for i in range(layout.config.num_hidden_layers) if layout.config.is_sparse(i))
    splits = layout.splits(f"layers.{sparse}.self_attn.k_proj")
    heads, compared, other = np.arange(layout.config.num_key_value_heads)[None], 0, 0
    for rank, layers in found.items():
        group = layout.place(REQUESTS, rank)
        start, stop = (sum(lengths[: rows * edge]) for edge in (group, group + 1))
        own = layout.take(heads, splits, rank)[0]
        assert len(layers) == len(expected)
        for part, whole in zip(layers, expected, strict=True):
            different = (part[:, : stop - start] != whole[own, start:stop]).any(axis=-1)
            compared, other = compared + different.size, other + int(different.sum())
    return compared, other
