"""Logits of whole prompts without a cache, as one executable."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from minimax_jax.attention import ReferenceAttend
from minimax_jax.buckets import bucket
from minimax_jax.config import MiniMaxM3Config
from minimax_jax.model import SINGLE_DEVICE, merge_model
from minimax_jax.parallel import Ranks

_LEAST_TOKENS = 16


class FullForward:
    """The compiled forward of one model; see `Steps` for the arguments."""

    def __init__(
        self, config: MiniMaxM3Config, graphdef: nnx.GraphDef, names: tuple[str, ...], ranks: Ranks | None = None
    ):
        self._config, self._graphdef, self._names, self._ranks = config, graphdef, names, ranks
        self._run = jax.jit(self._logits, static_argnames="max_len")

    def __call__(self, leaves: list[Array], prompts: list[np.ndarray]) -> Float[Array, "T V"]:
        """Logits of all tokens of the prompts, concatenated."""
        groups = 1 if self._ranks is None else self._ranks.groups
        rows = bucket(-(-len(prompts) // groups))
        parts = [prompts[first : first + rows] for first in range(0, rows * groups, rows)]
        size = bucket(max(sum(map(len, part)) for part in parts), _LEAST_TOKENS)
        tokens, positions = np.zeros((2, groups, size), np.int32)
        starts, live = np.zeros((groups, rows + 1), np.int32), np.zeros((groups, size), bool)
        for group, part in enumerate(parts):
            ends = np.cumsum([len(prompt) for prompt in part], dtype=np.int32)
            total = int(ends[-1]) if part else 0
            starts[group] = total
            starts[group, 0], starts[group, 1 : len(part) + 1] = 0, ends
            live[group, :total] = True
            for prompt, end in zip(part, ends, strict=True):
                tokens[group, end - len(prompt) : end] = prompt
                positions[group, end - len(prompt) : end] = np.arange(len(prompt))
        step: list[Any] = [tokens.reshape(-1), positions.reshape(-1), starts.reshape(-1)]
        if self._ranks is not None:
            step = self._ranks.place(step, [self._ranks.rows] * 3)
        flat = self._run(leaves, *step, max_len=bucket(max(map(len, prompts))))
        return flat[: int(live.sum())] if groups == 1 else flat[np.nonzero(live.reshape(-1))[0]]

    def _logits(self, leaves, tokens, positions, starts, *, max_len):
        run: Callable[..., Any] = functools.partial(self._rank_logits, max_len=max_len)
        if (ranks := self._ranks) is not None:
            run = ranks.per_rank(run, (ranks.weight_specs(self._names), *(ranks.rows,) * 3), ranks.logits)
        return run(leaves, tokens, positions, starts)

    def _rank_logits(self, leaves, tokens, positions, starts, *, max_len):
        comm = SINGLE_DEVICE if self._ranks is None else self._ranks.comm
        model = merge_model(self._graphdef, dict(zip(self._names, leaves, strict=True)))
        attend = ReferenceAttend(self._config, starts, tokens.shape[0], max_len)
        return model.rank_logits(model.run_layers(model.embed(tokens, comm), positions, attend, comm))
