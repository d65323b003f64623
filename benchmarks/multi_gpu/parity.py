"""The embedded checkpoint over a mesh and on one device: greedy tokens and selected blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.multi_gpu.selections import different_rows, selections
from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.parallel import ParallelConfig

_LENGTHS = (1500, 40, 300)  # the first is longer than the 8 blocks of 128 that a token selects
_TINY_LENGTHS = (1100, 20)
# of the selections: sums of another order differ in their last bits, and so does which of two equal blocks is ahead
_MOST_DIFFERENT = 1e-3


def check_parity(
    parallel: ParallelConfig, *, tiny: bool, new_tokens: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """float32 decides; bfloat16, in which sums of other orders round differently, is told.

    Returns:
      "rows" by dtype and options of `ParallelConfig`: the share of "same_tokens", (head, token) rows with
      "other_blocks" "of" so many; "fine": whether float32 gives the same tokens, and other blocks in less than one row
      of a thousand.
    """
    random = np.random.default_rng(0)
    lengths = _TINY_LENGTHS if tiny else _LENGTHS
    rows: list[dict[str, Any]] = []
    for dtype in ("float32",) if tiny else ("float32", "bfloat16"):
        one = MiniMaxM3ForCausalLM.from_pretrained("tiny", dtype, progress=False)
        prompts = [random.integers(0, one.config.vocab_size, length).tolist() for length in lengths]
        tokens, blocks = _tokens(one, prompts, new_tokens), selections(one, prompts[0])
        say(f"  {dtype}: one device has answered ...")
        for options in _options(parallel, tiny=tiny):
            sizes = dataclasses.replace(parallel, **options)
            model = MiniMaxM3ForCausalLM.from_pretrained("tiny", dtype, parallel=sizes, progress=False)
            assert model.ranks is not None
            found = selections(model, prompts[0])
            row = {
                "dtype": dtype,
                **options,
                "same_tokens": float((_tokens(model, prompts, new_tokens) == tokens).mean()),
                "other_blocks": different_rows(blocks, found, model.ranks.layout),
                "of": sum(len(layer) * layer.shape[1] for layer in found),
            }
            rows.append(row)
            say(f"  {dtype}, {options or 'as it is'}: {row['same_tokens']:.1%} of the tokens are the same, "
                f"{row['other_blocks']} of {row['of']} selections differ")  # fmt: skip
    exact = [row for row in rows if row["dtype"] == "float32"]
    fine = all(row["same_tokens"] == 1 and row["other_blocks"] < _MOST_DIFFERENT * row["of"] for row in exact)
    return {"rows": rows, "fine": fine}


def _options(parallel: ParallelConfig, *, tiny: bool) -> list[dict[str, Any]]:
    """Ways to run the layout beside the plain one."""
    options: list[dict[str, Any]] = [{}]
    if parallel.tensor > 1 and not tiny:
        options.append({"split_index_keys": True})
    if parallel.attention_data > 1:
        options.append({"all_to_all_tokens": 1})
    return options


def _tokens(model: MiniMaxM3ForCausalLM, prompts: list[list[int]], new_tokens: int) -> np.ndarray:
    found = model.generate(prompts, max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1)
    return np.asarray(found)[:, -new_tokens:]
