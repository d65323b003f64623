"""The embedded checkpoint over a mesh and on one device: greedy tokens and selected blocks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.multi_gpu.compile_log import saying_compiles
from benchmarks.multi_gpu.selections import different_rows, selections
from minimax_jax import MiniMaxM3ForCausalLM
from minimax_jax.parallel import ParallelConfig

_LENGTHS = (1500, 40, 300)  # the first is longer than the 8 blocks of 128 that a token selects
_TINY_LENGTHS = (1100, 20)
# of the selections: sums of another order differ in their last bits, and so does which of two equal blocks is ahead
_MOST_DIFFERENT = 1e-3


def check_parity(
    parallel: ParallelConfig,
    *,
    tiny: bool,
    new_tokens: int,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
    deadline: float,
) -> dict[str, Any]:
    """float32 decides; bfloat16, in which sums of other orders round differently, is told.

    Args:
      say, save: progress, and what is compiled; the record, after every row.
      deadline: of `time.monotonic`, after which no row of bfloat16 begins.

    Returns:
      "rows" by dtype and options of `ParallelConfig`: the share of "same_tokens", (head, token) rows with
      "other_blocks" "of" so many; "left_out" for want of time; "fine": whether float32 gives the same tokens, and other
      blocks in less than one row of a thousand.
    """
    random = np.random.default_rng(0)
    lengths = _TINY_LENGTHS if tiny else _LENGTHS
    record: dict[str, Any] = {"rows": [], "left_out": [], "fine": True}
    one: tuple[np.ndarray, list[np.ndarray]] | None = None
    with saying_compiles(say) as compiled:
        for dtype in ("float32",) if tiny else ("float32", "bfloat16"):
            for options in (None, *_options(parallel, tiny=tiny)):
                where = f"{dtype}, {'one device' if options is None else options or 'as it is'}"
                if dtype != "float32" and time.monotonic() > deadline:
                    record["left_out"].append(where)
                    continue
                sizes = None if options is None else dataclasses.replace(parallel, **options)
                say(f"  {where}: loading ...")
                model = MiniMaxM3ForCausalLM.from_pretrained("tiny", dtype, parallel=sizes, progress=False)
                if options is None:
                    prompts = [random.integers(0, model.config.vocab_size, length).tolist() for length in lengths]
                say(f"  {where}: the blocks that {lengths[0]} tokens select ...")
                found = selections(model, prompts[0])
                say(f"  {where}: {new_tokens} tokens after {len(lengths)} prompts ...")
                tokens = _tokens(model, prompts, new_tokens)
                if options is None:
                    one = tokens, found
                    continue
                assert one is not None and model.ranks is not None
                row = {
                    "dtype": dtype,
                    **options,
                    "same_tokens": float((tokens == one[0]).mean()),
                    "other_blocks": different_rows(one[1], found, model.ranks.layout),
                    "of": sum(len(layer) * layer.shape[1] for layer in found),
                }
                record["rows"].append(row)
                exact = row["same_tokens"] == 1 and row["other_blocks"] < _MOST_DIFFERENT * row["of"]
                record["fine"] &= exact or dtype != "float32"
                record["compiled"] = dict(compiled)
                save(record)
                say(f"  {where}: {row['same_tokens']:.1%} of the tokens are the same, "
                    f"{row['other_blocks']} of {row['of']} selections differ")  # fmt: skip
        say(f"  {compiled['programs']} programs were compiled in {compiled['seconds']:.0f} s")
    return record


def _options(parallel: ParallelConfig, *, tiny: bool) -> list[dict[str, Any]]:
    """Ways to run the layout beside the plain one."""
    options: list[dict[str, Any]] = [{}]
    if parallel.tensor > 1 and not tiny:
        options.append({"split_index_keys": True})
    if parallel.attention_data > 1:
        options.append({"all_to_all_tokens": 1})
    return options


def _tokens(model: MiniMaxM3ForCausalLM, prompts: list[list[int]], new_tokens: int) -> np.ndarray:
    # whole steps on one device too, where segments would be further programs
    found = model.generate(prompts, max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, execution="whole")
    return np.asarray(found)[:, -new_tokens:]
