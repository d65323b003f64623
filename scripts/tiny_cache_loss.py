#!/usr/bin/env python3
"""Next-token loss of the embedded checkpoint with its keys and values in caches of each type.

  python scripts/tiny_cache_loss.py                              the chapters in tests/data (2,066 tokens)
  python scripts/tiny_cache_loss.py --data .tiny --documents 41  long held-out documents, from scripts/tiny_corpus.py

Every token goes through the pages, a chunk at a time. Prints a line a document and type, writes cache_loss.json to
--out. Exit status: 0, or 1 when the loss over fp8 caches is more than 0.5 % above that over the weights'
type.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.machine import describe_machine  # noqa: E402
from minimax_jax import MiniMaxM3ForCausalLM  # noqa: E402
from minimax_jax.loss import causal_lm_loss  # noqa: E402
from minimax_jax.tokenizer import Tokenizer  # noqa: E402

MOST = 1.005  # fp8 over the weights' type
LONGEST = 8192


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny", help="checkpoint directory (default: the embedded one)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of weights (default: auto)")
    add("--data", type=Path, help="folder with val.npy and val_offsets.npy (default: tests/data/held_out.txt)")
    add("--documents", type=int, default=4, help="of --data, of those of 8,192 tokens or more (default: 4)")
    add("--chunk", type=int, default=2048, help="tokens of one call (default: 2048)")
    add("--out", type=Path, default=Path("cache_loss"), help="folder for the result (default: cache_loss)")
    return parser.parse_args()


def documents_of(args: argparse.Namespace, model: MiniMaxM3ForCausalLM) -> list[np.ndarray]:
    """Token ids, at most LONGEST of each document."""
    if args.data is None:
        text = (ROOT / "tests" / "data" / "held_out.txt").read_text(encoding="utf-8")
        return [np.array([model.config.bos_token_id, *model.tokenizer.encode(text)], np.int32)]
    tokens, offsets = np.load(args.data / "val.npy"), np.load(args.data / "val_offsets.npy")
    theirs = Tokenizer.from_pretrained(args.data)  # the corpus trains one, which need not be the model's
    found = []
    for begin, end in itertools.pairwise(offsets):
        ids = model.tokenizer.encode(theirs.decode(tokens[begin:end].tolist()))
        if len(ids) >= LONGEST and len(found) < args.documents:
            found.append(np.array([model.config.bos_token_id, *ids], np.int32)[:LONGEST])
    return found


def loss_of(model: MiniMaxM3ForCausalLM, ids: np.ndarray, cache_dtype: str, chunk: int) -> float:
    """Mean loss in nats over all tokens but the first."""
    past = model.empty_past_key_values(1, max_cache_len=LONGEST, cache_dtype=cache_dtype)
    total = 0.0
    for begin in range(0, len(ids) - 1, chunk):
        end = min(begin + chunk, len(ids) - 1)
        logits = model([ids[begin:end].tolist()], past_key_values=past).logits
        # the loss shifts labels by one: the first is not counted, the last of the chunk is the token after it
        labels = np.concatenate([[-100], ids[begin + 1 : end + 1]])[None]
        padded = jax.numpy.pad(logits, [(0, 0), (0, 1), (0, 0)])
        total += float(causal_lm_loss(padded, labels)) * (end - begin)
    past.pool.release()
    return total / (len(ids) - 1)


def main() -> int:
    """Measures and reports."""
    args = arguments()
    model = MiniMaxM3ForCausalLM.from_pretrained(args.model, args.dtype)
    rows = []
    for number, ids in enumerate(documents_of(args, model)):
        row: dict[str, float | int] = {"tokens": len(ids)}
        for kind in ("auto", "fp8"):
            begin = time.monotonic()
            row[kind] = loss_of(model, ids, kind, args.chunk)
            seconds = time.monotonic() - begin
            print(
                f"document {number}, {len(ids)} tokens, caches {kind}: {row[kind]:.5f} nats ({seconds:.0f} s)",
                flush=True,
            )
        rows.append(row)
    weights = [row["tokens"] - 1 for row in rows]
    auto, fp8 = (float(np.average([row[kind] for row in rows], weights=weights)) for kind in ("auto", "fp8"))
    print(f"{len(rows)} documents, {model.dtype.name}: {auto:.5f}, fp8 {fp8:.5f}, ratio {fp8 / auto:.5f}")
    record = {
        "machine": describe_machine(), "model": args.model, "dtype": model.dtype.name, "auto": auto, "fp8": fp8,
        "ratio": fp8 / auto, "documents": rows,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cache_loss.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if fp8 <= MOST * auto else 1


if __name__ == "__main__":
    sys.exit(main())
