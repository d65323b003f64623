"""The cut of top-k and top-p without sorting: one program a row finds it bit by bit.

Of integers in the order of the values, the largest one that still has k values at or above it is built from its highest
bit down; so is the largest one at or above which lies enough probability. Each bit takes one count, or one sum in a
fixed order, over values that stay in registers. XLA would sort them with the CUB library, whose calls fit into no CUDA
graph; and a loop with one such call stays outside of graphs as a whole.

Of a large vocabulary a launch before this one chooses the blocks of 128 tokens with the largest maxima, in which the
likeliest tokens lie; only rows whose cut is not among these walk through the whole vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from minimax_kernels.likeliest import BLOCK, in_blocks
from minimax_kernels.select_blocks.sortable import LOWEST, sortable
from minimax_kernels.triton_call import Launch, ceil_div, next_power_of_two, triton_call

LEAST_SHARE = 1e-30  # of a top-p below this: a smaller one may be 0 on the device, which no tokens at all reach
CHUNK = 4096  # tokens that a program reads at a time where it walks through a row
MOST_LANES = 16384  # values that a program holds
VALUES_PER_WARP = 1024

Fold = Callable[[Callable[[Any, Any, Any], Any]], Any]  # sums a function of tokens' (keys, weights, numbers)


def sampling_cut(
    scaled: Float[Array, "R V"],
    top_k: Int[Array, "R"],
    top_p: Float[Array, "R"],
    min_p: Float[Array, "R"],
    *,
    candidates: int,
    interpret: bool = False,
) -> tuple[Float[Array, "R"], Int[Array, "R"]]:
    """See `minimax_kernels.sampling_cut`."""
    num_rows, vocab_size = scaled.shape
    num_blocks = ceil_div(vocab_size, BLOCK)
    if candidates * BLOCK > MOST_LANES or num_blocks > MOST_LANES:
        raise NotImplementedError(
            f"pallas_triton: {candidates} candidates of V = {vocab_size}: at most {MOST_LANES // BLOCK} of "
            f"{MOST_LANES * BLOCK}"
        )
    out_shape = jax.ShapeDtypeStruct((num_rows,), jnp.float32), jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    if num_rows == 0:
        return jnp.zeros(0, jnp.float32), jnp.zeros(0, jnp.int32)
    floor = jnp.log(min_p)
    args: list[Array] = [scaled, top_k, jnp.maximum(top_p, LEAST_SHARE), floor]
    kernel: Callable[..., None] = _whole_row_kernel
    lanes = vocab_size
    if num_blocks > candidates:
        args += _likely_blocks(scaled, candidates, interpret=interpret)
        args.append(jnp.where(scaled >= floor[:, None], jnp.exp(scaled), 0).sum(axis=-1))
        kernel, lanes = functools.partial(_among_blocks_kernel, count=candidates), candidates * BLOCK
    lanes = next_power_of_two(lanes)
    cut: tuple[Float[Array, "R"], Int[Array, "R"]] = triton_call(
        functools.partial(kernel, lanes=lanes),
        args,
        out_shape,
        grid=(num_rows,),
        launch=_launch(lanes),
        name="sampling_cut",
        interpret=interpret,
    )
    return cut


def _launch(lanes: int) -> Launch:
    return Launch(num_warps=min(max(lanes // VALUES_PER_WARP, 4), 16), num_stages=1)


def _likely_blocks(
    scaled: Float[Array, "R V"], count: int, *, interpret: bool
) -> tuple[Int[Array, "R count"], Int[Array, "R"]]:
    """(ids, in order, of the blocks with the largest maxima, the key of the smallest of these)."""
    maxima = in_blocks(scaled).max(axis=-1)
    num_rows, lanes = maxima.shape[0], next_power_of_two(maxima.shape[1])
    blocks: tuple[Int[Array, "R count"], Int[Array, "R"]] = triton_call(
        functools.partial(_blocks_kernel, count=count, lanes=lanes),
        [maxima],
        (jax.ShapeDtypeStruct((num_rows, count), jnp.int32), jax.ShapeDtypeStruct((num_rows,), jnp.int32)),
        grid=(num_rows,),
        launch=_launch(lanes),
        name="sampling_blocks",
        interpret=interpret,
    )
    return blocks


def _blocks_kernel(maxima_ref: Any, ids_ref: Any, least_ref: Any, *, count: int, lanes: int) -> None:
    row, num_blocks = pl.program_id(0), maxima_ref.shape[1]
    lane = jnp.arange(lanes, dtype=jnp.int32)
    real = lane < num_blocks
    keys = sortable(plgpu.load(maxima_ref.at[row, jnp.minimum(lane, num_blocks - 1)], mask=real, other=-jnp.inf))
    fold = _held(jnp.where(real, keys, LOWEST), jnp.zeros((lanes,), jnp.float32), lane)
    least = _largest_key(lambda key: fold(lambda keys, _, __: _ones(keys >= key)) >= count)
    ties = count - fold(lambda keys, _, __: _ones(keys > least))
    last = _find_tie(fold, least, ties, lanes)
    chosen = (keys > least) | ((keys == least) & (lane <= last))
    place = jnp.cumsum(_ones(chosen)) - 1
    to = jnp.where(chosen, place, count)  # out of bounds, which the interpreter drops
    plgpu.store(ids_ref.at[row, to], lane, mask=chosen)
    plgpu.store(least_ref.at[row], least)


def _whole_row_kernel(
    scaled_ref: Any, top_k_ref: Any, top_p_ref: Any, floor_ref: Any, value_ref: Any, id_ref: Any, *, lanes: int
) -> None:
    row, vocab_size = pl.program_id(0), scaled_ref.shape[1]
    top_k, top_p = top_k_ref[row], top_p_ref[row]
    fold = _held(*_tokens(scaled_ref, row, jnp.arange(lanes, dtype=jnp.int32), floor_ref[row]))
    key, ties, _ = _cut(fold, top_k >= vocab_size, jnp.minimum(top_k, vocab_size), top_p, jnp.float32(0))
    _store(value_ref, id_ref, row, key, _find_tie(fold, key, ties, lanes))


def _among_blocks_kernel(
    scaled_ref: Any, top_k_ref: Any, top_p_ref: Any, floor_ref: Any, blocks_ref: Any, least_ref: Any, total_ref: Any,
    value_ref: Any, id_ref: Any, *, count: int, lanes: int,
) -> None:  # fmt: skip
    row, vocab_size = pl.program_id(0), scaled_ref.shape[1]
    top_k, top_p, floor, least = top_k_ref[row], top_p_ref[row], floor_ref[row], least_ref[row]
    whole = top_k >= vocab_size
    given = jnp.where(whole, total_ref[row], 0.0)
    lane = jnp.arange(lanes, dtype=jnp.int32)
    held = lane < count * BLOCK
    block = plgpu.load(blocks_ref.at[row, jnp.minimum(lane // BLOCK, count - 1)])
    token = jnp.where(held, block * BLOCK + lane % BLOCK, vocab_size)
    fold = _held(*_tokens(scaled_ref, row, token, floor)[:2], lane)  # the order of lanes is that of tokens
    key, ties, reached = _cut(fold, whole, jnp.minimum(top_k, count), top_p, given)
    # tokens elsewhere are no better than the least of the blocks' maxima, and `count` of these here are
    found = (top_k <= count) | (whole & reached & (key > least))
    uncut = whole & (top_p >= 1)

    def here() -> tuple[Any, Any]:
        last = _find_tie(fold, key, ties, lanes)
        return jnp.where(uncut, LOWEST, key), jnp.where(
            uncut, vocab_size - 1, jnp.sum(jnp.where(lane == last, token, 0))
        )

    def anywhere() -> tuple[Any, Any]:
        walk = _walk(scaled_ref, row, floor)
        key, ties, _ = _cut(walk, whole, jnp.minimum(top_k, vocab_size), top_p, given)
        return key, _find_tie(walk, key, ties, next_power_of_two(vocab_size))

    _store(value_ref, id_ref, row, *lax.cond(found | uncut, here, anywhere))


def _tokens(scaled_ref: Any, row: Any, token: Any, floor: Any) -> tuple[Any, Any, Any]:
    """(keys, weights, ids) of some tokens of a row; those that are none have the lowest key."""
    vocab_size = scaled_ref.shape[1]
    real = token < vocab_size
    values = plgpu.load(scaled_ref.at[row, jnp.minimum(token, vocab_size - 1)], mask=real, other=-jnp.inf)
    weights = jnp.where(real & (values >= floor), jnp.exp(values), 0.0)
    return jnp.where(real, sortable(values), LOWEST), weights, token


def _held(keys: Any, weights: Any, numbers: Any) -> Fold:
    """Over tokens in registers."""
    return lambda function: jnp.sum(function(keys, weights, numbers))


def _walk(scaled_ref: Any, row: Any, floor: Any) -> Fold:
    """Over all tokens of a row, a chunk at a time."""
    lane = jnp.arange(CHUNK, dtype=jnp.int32)

    def fold(function: Callable[[Any, Any, Any], Any]) -> Any:
        def chunk(i: Any) -> Any:
            return function(*_tokens(scaled_ref, row, i * CHUNK + lane, floor))

        first = chunk(jnp.int32(0))
        sums = lax.fori_loop(1, ceil_div(scaled_ref.shape[1], CHUNK), lambda i, sums: sums + chunk(i), first)
        return jnp.sum(sums)

    return fold


def _cut(fold: Fold, whole: Any, top_k: Any, top_p: Any, given: Any) -> tuple[Any, Any, Any]:
    """(key of the last token that is kept, how many of its equals are, whether top-p cuts above top-k's).

    Args:
      whole: whether top-k cuts nothing; the key is the lowest one then, unless top-p cuts.
      top_k: at most as many as there are tokens.
      given: the sum of the weights of what top-k keeps; 0 for what is found here.
    """

    def enough_tokens(key: Any) -> Any:
        return fold(lambda keys, _, __: _ones(keys >= key)) >= top_k

    def no_cut() -> Any:
        return jnp.minimum(top_k, LOWEST)  # not a plain constant, which a branch may not return on the Triton backend

    by_count = lax.cond(whole, no_cut, lambda: _largest_key(enough_tokens))
    ties_by_count = top_k - fold(lambda keys, _, __: _ones(keys > by_count))

    def above(key: Any) -> Any:
        return fold(lambda keys, weights, _: jnp.where(keys > key, weights, 0.0))

    tie_weights = fold(lambda keys, weights, _: jnp.where(keys == by_count, weights, 0.0))
    tie_count = fold(lambda keys, _, __: _ones(keys == by_count))
    own = above(by_count) + tie_weights * (ties_by_count.astype(jnp.float32) / _at_least_one(tie_count))
    total = jnp.where(given > 0, given, own)

    def enough_mass(key: Any) -> Any:
        reached = fold(lambda keys, weights, _: jnp.where((keys >= key) & (keys > by_count), weights, 0.0))
        return reached / total >= top_p

    by_mass = lax.cond(top_p < 1, lambda: _largest_key(enough_mass), no_cut)
    reached = (by_mass > by_count) & (top_p < 1)
    key = jnp.where(reached, by_mass, by_count)
    before = above(key)
    count = fold(lambda keys, _, __: _ones(keys == key))
    weight = fold(lambda keys, weights, _: jnp.where(keys == key, weights, 0.0)) / _at_least_one(count)
    most = jnp.where(reached, count, ties_by_count)

    def kept(_: Any, __: Any, numbers: Any) -> Any:
        """Of the equal ones, which are counted with the numbers of all, those before which top-p is not reached."""
        short = (before + numbers.astype(jnp.float32) * weight) / total < top_p
        return _ones((numbers < most) & (short | (top_p >= 1)))

    return key, jnp.maximum(fold(kept), 1), reached


def _largest_key(fits: Callable[[Any], Any]) -> Any:
    """The largest key that fits, where all smaller ones do; the lowest one if none does."""

    def set_bit(i: Any, key: Any) -> Any:
        more = key + lax.shift_left(jnp.int32(1), jnp.int32(31) - i)  # the first of them wraps around to 0
        return jnp.where(fits(more), more, key)

    return lax.fori_loop(0, 32, set_bit, jnp.int32(LOWEST))


def _find_tie(fold: Fold, key: Any, ties: Any, bound: int) -> Any:
    """The number, below `bound`, a power of two, of the last of the first `ties` tokens with this key."""

    def set_bit(i: Any, found: Any) -> Any:
        more = found + lax.shift_right_logical(jnp.int32(bound // 2), i)
        return jnp.where(fold(lambda keys, _, numbers: _ones((keys == key) & (numbers < more))) < ties, more, found)

    return lax.fori_loop(0, bound.bit_length() - 1, set_bit, jnp.int32(0))


def _at_least_one(count: Any) -> Any:
    return jnp.maximum(count, 1).astype(jnp.float32)


def _ones(mask: Any) -> Any:
    return mask.astype(jnp.int32)


def _store(value_ref: Any, id_ref: Any, row: Any, key: Any, token: Any) -> None:
    """Stores the value that a key stands for, -inf for the lowest."""
    bits = jnp.where(key < 0, key ^ 0x7FFFFFFF, key)
    value = jnp.where(key == LOWEST, -jnp.inf, lax.bitcast_convert_type(bits, jnp.float32))
    plgpu.store(value_ref.at[row], value)
    plgpu.store(id_ref.at[row], token)
