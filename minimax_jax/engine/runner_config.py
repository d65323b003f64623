"""How steps run, and which shapes they are padded to."""

from __future__ import annotations

import dataclasses

from minimax_jax.buckets import buckets_up_to, padded_size
from minimax_jax.engine.execution import check_execution
from minimax_jax.engine.segmented_prefill import LEAST_BUCKET
from minimax_jax.engine.steps import MAX_PREFILL_TOKENS

_FEW_ROWS = 8  # sequences of a step with prompts, up to which it is not padded to a full batch


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    """How steps run, and which shapes they are padded to.

    Attributes:
      max_batch_size: sequences of one step, on each data rank.
      execution: "segmented", "whole", "eager" or "auto"; see `engine/execution.py`.
      batch_sizes: rows to compile for, the largest at least `max_batch_size`; None for powers of two and three quarters
        of these. Steps that only decode are padded to one of them, others to one of two.
      pad_batches: without it, such steps are compiled for each number of rows that occurs.
      token_buckets: tokens to compile for where prompts take part.
      page_buckets: widths of block tables to compile for; None for powers of two and three quarters.
      steps_per_launch: decode steps that one executable runs where the engine runs ahead; 1 for none such.
      graph_loops: whether on a GPU these are to lie in a CUDA graph.
    """

    max_batch_size: int
    execution: str = "auto"
    batch_sizes: tuple[int, ...] | None = None
    pad_batches: bool = True
    token_buckets: tuple[int, ...] = buckets_up_to(MAX_PREFILL_TOKENS, LEAST_BUCKET)
    page_buckets: tuple[int, ...] | None = None
    steps_per_launch: int = 1
    graph_loops: bool = False

    def __post_init__(self) -> None:
        check_execution(self.execution)

    def rows(self, count: int) -> int:
        """Rows to compile for, for `count` sequences."""
        return padded_size(count, self.batch_sizes)

    def mixed_rows(self, count: int) -> int:
        """The same where prompts take part: one of two sizes, since tokens and pages vary there as well."""
        few = self.rows(min(_FEW_ROWS, self.max_batch_size))
        return few if count <= few else self.rows(self.max_batch_size)

    def tokens(self, count: int) -> int:
        """Tokens to compile for, where prompts take part."""
        return padded_size(count, self.token_buckets)

    def pages(self, count: int) -> int:
        """Width of the block tables to compile for."""
        return padded_size(count, self.page_buckets)
