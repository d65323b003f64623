"""Puts an engine together: shapes, pool, schedulers, loop."""

from __future__ import annotations

import dataclasses
import itertools

import jax
from jaxtyping import Array
from tqdm import tqdm

from minimax_jax.buckets import buckets_up_to
from minimax_jax.cache import PageAllocator, PagePool
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.engine.cache_sizing import fill_memory
from minimax_jax.engine.core import EngineCore, RunAhead
from minimax_jax.engine.engine_config import CacheConfig, DecodeConfig, SegmentConfig
from minimax_jax.engine.runner_config import RunnerConfig
from minimax_jax.engine.scheduler import Scheduler
from minimax_jax.engine.segmented_prefill import LEAST_BUCKET
from minimax_jax.engine.step_inputs import GREEDY, LOOP_FEATURES
from minimax_jax.engine.step_runner import StepRunner
from minimax_jax.engine.steps import Steps
from minimax_jax.tensor_table import cache_bytes_per_token

_CPU_CACHE_BYTES = 1 << 30
_NARROWEST_TABLE, _WIDENING = 8, 4


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the engine takes at once.

    Attributes:
      max_batch_size: sequences that run, on each data rank.
      max_num_tokens: of one step, on each data rank.
      max_seq_len: of prompt and answer together.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int


def build_core(
    steps: Steps,
    leaves: list[Array],
    config: MiniMaxM3Config,
    limits: Limits,
    cache: CacheConfig,
    segment: SegmentConfig,
    decode: DecodeConfig,
    *,
    dtype: str,
    end_ids: tuple[int, ...],
    warm_up: bool | str,
    progress: bool = True,
) -> EngineCore:
    """An engine over a pool of the size that `cache` asks for.

    Args:
      dtype: of the caches, by name.
      end_ids: end-of-text tokens.
      warm_up: whether the largest steps run before the first request, or "all" combinations of the buckets; the
        largest always do where memory is measured.
      progress: whether warming up all of them shows a bar on stderr.

    Raises:
      ValueError: for settings that do not fit the model or the device.
    """
    page_size = config.index_block_size
    if cache.page_size != page_size:
        raise ValueError(f"cache_config: page_size = {cache.page_size}: must be {page_size}, the model's sparse block")
    buckets = segment.buckets or buckets_up_to(limits.max_num_tokens, LEAST_BUCKET)
    if buckets[-1] < limits.max_num_tokens:
        raise ValueError(
            f"segment_config: buckets end at {buckets[-1]}: must reach max_num_tokens = {limits.max_num_tokens}"
        )
    device = leaves[0].addressable_shards[0].device
    itemsize = jax.numpy.dtype(dtype).itemsize
    layout = None if steps.ranks is None else steps.ranks.layout
    local, index_ranks = (config, 1) if layout is None else (layout.local_config, layout.index_ranks)
    page_bytes = page_size * cache_bytes_per_token(local, itemsize=itemsize, index_ranks=index_ranks)
    most = None if cache.max_tokens is None else max(1, cache.max_tokens // page_size)
    measured = device.memory_stats() is not None
    width = -(-limits.max_seq_len // page_size)
    if not measured and most is None:
        most = max(1, min(limits.max_batch_size * width, _CPU_CACHE_BYTES // page_bytes))
    page_buckets = decode.page_buckets or (None if device.platform == "cpu" else _wide_tables(width))
    steps_per_launch = decode.steps_on(device.platform)
    place = leaves[0].sharding if steps.ranks is None else steps.ranks.cache_placement
    small = limits.max_batch_size if most is None else min(most, limits.max_batch_size)
    pool = PagePool(config, small, dtype, place)
    runner = StepRunner(
        steps,
        leaves,
        config,
        pool,
        RunnerConfig(
            limits.max_batch_size,
            segment.execution,
            batch_sizes=decode.batch_sizes or _batch_sizes(limits.max_batch_size),
            pad_batches=decode.enable_padding,
            token_buckets=buckets,
            page_buckets=page_buckets,
            steps_per_launch=steps_per_launch,
            graph_loops=decode.graph_loops,
        ),
        end_ids=end_ids,
        max_pages=width,
        segmented=steps.segments(buckets, (limits.max_batch_size,), page_buckets),
    )

    rows, pages = runner.config.rows(limits.max_batch_size), runner.config.pages(width)

    def run_largest() -> None:
        runner.warm_up("prefill", runner.config.tokens(limits.max_num_tokens), rows, pages)
        runner.warm_up("decode", rows, rows, pages)

    if measured or warm_up is True:
        fill_memory(
            pool,
            run_largest,
            device,
            page_bytes,
            num_pages=None if measured else most,
            most_pages=most,
            memory_fraction=cache.free_memory_fraction,
        )
        if steps_per_launch > 1:  # the loop where all are greedy: as likely to be met first, and of less memory
            runner.warm_up("decode", rows, rows, pages, loops=(GREEDY,))
    elif most is not None and most != pool.num_pages:
        pool.resize(most, keep=False)
    if warm_up == "all":
        warm_up_all(runner, pages, progress=progress)
    schedulers = [
        Scheduler(
            PageAllocator(pool.num_pages, reuse=cache.enable_reuse),
            page_size=page_size,
            max_batch_size=limits.max_batch_size,
            max_num_tokens=limits.max_num_tokens,
        )
        for _ in range(1 if steps.ranks is None else steps.ranks.groups)
    ]
    run_ahead = RunAhead(steps_per_launch, while_streaming=decode.steps_per_launch != "auto")
    return EngineCore(runner, schedulers, end_ids=end_ids, run_ahead=run_ahead)


def _batch_sizes(most: int) -> tuple[int, ...]:
    """Powers of two, and the largest batch itself."""
    return (*(1 << power for power in range((most - 1).bit_length())), most)


def _wide_tables(most: int) -> tuple[int, ...]:
    """Few widths for a device whose kernels read a row's own pages only: compiling costs more there than width."""
    sizes = [_NARROWEST_TABLE]
    while sizes[-1] < most:
        sizes.append(sizes[-1] * _WIDENING)
    return (*(size for size in sizes if size < most), most)


def warm_up_all(runner: StepRunner, most_pages: int, *, progress: bool) -> None:
    """Runs a step of every shape that the buckets allow, the largest first, so that serving compiles none.

    Args:
      most_pages: of one sequence.
      progress: whether to show a bar on stderr.
    """
    config = runner.config
    rows = config.batch_sizes or buckets_up_to(config.max_batch_size)
    pages = [width for width in config.page_buckets or buckets_up_to(most_pages) if width <= most_pages]
    few, full = config.mixed_rows(1), config.mixed_rows(config.max_batch_size)
    steps = [("prefill", *shape) for shape in itertools.product(config.token_buckets, sorted({few, full}), pages)]
    # more than a few rows have at least a token each
    steps = [step for step in steps if step[2] == few or step[1] > few]
    steps += [("decode", count, count, width) for count, width in itertools.product(rows, pages)]
    for step in tqdm(steps[::-1], "warming up", unit="step", disable=None if progress else True, delay=2):
        runner.warm_up(*step, loops=LOOP_FEATURES)
