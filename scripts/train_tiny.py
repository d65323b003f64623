#!/usr/bin/env python3
"""Trains the embedded checkpoint: a small MiniMax-M3 with every part of the architecture.

Three phases, as MSA's training has them: dense attention on short windows; dense attention on long windows
while the index branch learns the main branch's attention per block; then sparse attention. Next-token loss
throughout, experts balanced by the selection bias, AdamW from optax. Data comes from scripts/tiny_corpus.py.
The embedded checkpoint was made by

    python scripts/tiny_corpus.py
    python scripts/train_tiny.py --out trained_tiny --dense-steps 7000 --warmup-steps 220 --sparse-steps 260
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from tiny_attend import TrainingAttend

from minimax_jax.checkpoint import save_state
from minimax_jax.config import DENSE_MLP, FULL_ATTENTION, MOE_MLP, SPARSE_ATTENTION, MiniMaxM3Config
from minimax_jax.model import Comm, MiniMaxM3, merge_model, split_model

IGNORED = -1  # target of positions that carry no loss


def tiny_config() -> MiniMaxM3Config:
    """Six layers: two dense ones, then four sparse ones with experts; heads and blocks as the kernels serve them."""
    return MiniMaxM3Config(
        vocab_size=2048,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        rotary_dim=32,
        rope_theta=5e6,
        max_position_embeddings=8192,
        dense_intermediate_size=384,
        intermediate_size=64,
        shared_intermediate_size=64,
        num_local_experts=16,
        num_experts_per_tok=4,
        layer_types=(FULL_ATTENTION,) * 2 + (SPARSE_ATTENTION,) * 4,
        mlp_layer_types=(DENSE_MLP,) * 2 + (MOE_MLP,) * 4,
        index_n_heads=4,
        index_head_dim=64,
        index_block_size=128,
        index_topk_blocks=8,
        bos_token_id=2040,
        eos_token_id=2031,
    )


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training steps of one shape."""

    name: str
    steps: int
    sequences: int
    length: int
    mode: str
    index_loss: bool


class LoadCounter(Comm):
    """Counts the tokens that each expert gets, per MoE layer."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts
        self.loads: dict[int, Array] = {}

    def route(self, layer_id, expert_ids, weights):
        self.loads[layer_id] = jnp.zeros((self.num_experts,), jnp.float32).at[expert_ids.reshape(-1)].add(1.0)
        return expert_ids, weights


def forward(graphdef, weights, tokens: Int[Array, "R L"], attend: TrainingAttend, comm: Comm) -> Float[Array, "R*L V"]:
    """Logits of R whole sequences with matrices in bfloat16."""
    cast = {
        name: w if "mlp.gate." in name else w.astype(jnp.bfloat16) for name, w in weights.items()
    }  # the routers stay in float32, as in the released checkpoint
    model = merge_model(graphdef, cast)
    positions = jnp.tile(jnp.arange(tokens.shape[1]), tokens.shape[0])
    return model(tokens.reshape(-1), positions, attend, comm)


def token_losses(logits: Float[Array, "T V"], targets: Int[Array, "T"]) -> tuple[Float[Array, "T"], Array]:
    """(cross entropy of each token, zero where ignored; number of tokens that count)."""
    counts = targets != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counts, targets, 0))
    return jnp.where(counts, losses, 0.0), counts.sum()


def make_step(config: MiniMaxM3Config, graphdef, optimizer: optax.GradientTransformation, phase: Phase, bias_rate):
    """One jitted training step of a phase; weights and optimizer state are donated."""

    def loss_fn(weights, tokens):
        attend = TrainingAttend(config, phase.sequences, phase.length, mode=phase.mode, index_loss=phase.index_loss)
        counter = LoadCounter(config.num_local_experts)
        logits = forward(graphdef, weights, tokens[:, :-1], attend, counter)
        losses, count = token_losses(logits, tokens[:, 1:].reshape(-1))
        loss = losses.sum() / count
        index_loss = sum(attend.index_losses, jnp.zeros(()))
        return loss + index_loss, (loss, index_loss, counter.loads)

    def step(weights, opt_state, tokens):
        grads, (loss, index_loss, loads) = jax.grad(loss_fn, has_aux=True)(weights, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, weights)
        weights = optax.apply_updates(weights, updates)
        worst = jnp.zeros(())
        for layer_id, load in loads.items():
            name = f"layers.{layer_id}.mlp.gate.e_score_correction_bias"
            weights[name] = weights[name] + bias_rate * jnp.sign(load.mean() - load)
            worst = jnp.maximum(worst, load.max() / load.mean())
        return weights, opt_state, jnp.stack([loss, index_loss, worst])

    return jax.jit(step, donate_argnums=(0, 1))


def make_optimizer(total_steps: int, peak: float) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay; decay on matrices only, none on the balancing bias."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, min(200, total_steps // 10 + 1), total_steps, peak * 0.02)

    def decayed(weights):
        return {name: w.ndim >= 2 and "embed" not in name for name, w in weights.items()}

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=decayed),
    )


def evaluate(
    config: MiniMaxM3Config, graphdef, weights, documents: list[np.ndarray], mode: str, length: int, batch: int
) -> dict[str, float]:
    """Mean next-token loss over the first `length` tokens of each document, in all and past the top-k's reach."""
    reach = config.index_topk_blocks * config.index_block_size

    @jax.jit
    def losses_of(weights, tokens):
        attend = TrainingAttend(config, batch, length, mode=mode, index_loss=mode == "sparse")
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits = forward(graphdef, weights, jnp.maximum(inputs, 0), attend, Comm())
        losses, _ = token_losses(logits, targets.reshape(-1))
        return losses.reshape(batch, length)

    rows = np.full((-(-len(documents) // batch) * batch, length + 1), IGNORED, np.int32)
    for row, document in zip(rows, documents, strict=False):
        row[: min(len(document), length + 1)] = document[: length + 1]
    losses = np.concatenate([losses_of(weights, rows[i : i + batch]) for i in range(0, len(rows), batch)])
    counts = rows[:, 1:] != IGNORED
    return {
        "loss": float(losses.sum() / counts.sum()),
        "loss_past_topk": float(losses[:, reach:].sum() / counts[:, reach:].sum()),
        "tokens": int(counts.sum()),
    }


def expert_loads(config: MiniMaxM3Config, graphdef, weights, documents: list[np.ndarray], length: int) -> list[float]:
    """Share of the busiest expert over the mean, per MoE layer, on held-out text."""

    @jax.jit
    def loads_of(weights, tokens):
        counter = LoadCounter(config.num_local_experts)
        attend = TrainingAttend(config, 1, length, mode="dense", index_loss=False)
        forward(graphdef, weights, tokens, attend, counter)
        return counter.loads

    total: dict[int, np.ndarray] = {}
    for document in documents[:16]:
        if len(document) >= length:
            for layer_id, load in loads_of(weights, document[None, :length].astype(np.int32)).items():
                total[layer_id] = total.get(layer_id, 0) + np.asarray(load)
    return [round(float(load.max() / load.mean()), 3) for load in total.values()]


def sample_windows(tokens: np.ndarray, phase: Phase, rng: np.random.Generator) -> np.ndarray:
    """Random windows of the training text, one token longer than the model's input."""
    starts = rng.integers(0, len(tokens) - phase.length - 1, phase.sequences)
    return np.stack([tokens[s : s + phase.length + 1] for s in starts]).astype(np.int32)


def train(config: MiniMaxM3Config, phases: list[Phase], tokens: np.ndarray, peak: float, seed: int, log: list[dict]):
    """Runs all phases; returns the graph definition and the float32 weights."""
    graphdef, weights = split_model(MiniMaxM3(config, dtype=jnp.float32, rngs=nnx.Rngs(seed)))
    optimizer = make_optimizer(sum(phase.steps for phase in phases), peak)
    opt_state = optimizer.init(weights)
    rng = np.random.default_rng(seed)
    for phase in phases:
        step = make_step(config, graphdef, optimizer, phase, bias_rate=1e-3)
        started, window = time.perf_counter(), []
        for number in range(1, phase.steps + 1):
            weights, opt_state, metrics = step(weights, opt_state, sample_windows(tokens, phase, rng))
            window.append(metrics)
            if number % 50 == 0 or number == phase.steps:
                loss, index_loss, worst = np.mean(np.stack(window), axis=0)
                seconds = time.perf_counter() - started
                rate = number * phase.sequences * phase.length / seconds
                entry = {"phase": phase.name, "step": number, "loss": float(loss), "index_loss": float(index_loss)}
                log.append({**entry, "worst_load": float(worst), "seconds": seconds})
                print(
                    f"{phase.name:8s} step {number:5d}/{phase.steps}  loss {loss:.4f}  index {index_loss:.4f}  "
                    f"busiest expert {worst:.2f}x  {rate / 1e3:.0f}K tokens/s  {seconds:.0f} s",
                    flush=True,
                )
                window = []
    return graphdef, weights


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(".tiny"), help="what scripts/tiny_corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint and training.json")
    parser.add_argument("--dense-steps", type=int, default=4000, help="steps on windows of 2048 tokens")
    parser.add_argument("--warmup-steps", type=int, default=300, help="dense steps at 8192 tokens with the index loss")
    parser.add_argument("--sparse-steps", type=int, default=400, help="sparse steps at 8192 tokens")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens a step")
    parser.add_argument("--long", type=int, default=8192, help="length of the long windows and of the evaluation")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    for name in ("train.npy", "val.npy", "val_offsets.npy", "tokenizer.json"):
        if not (args.data / name).is_file():
            print(f"train_tiny: {args.data / name} is missing: run scripts/tiny_corpus.py first", file=sys.stderr)
            return 2
    config = tiny_config()
    short, long = min(2048, args.long), args.long
    phases = [
        Phase("dense", args.dense_steps, max(args.batch_tokens // short, 1), short, "dense", False),
        Phase("warm-up", args.warmup_steps, max(args.batch_tokens // long, 1), long, "dense", True),
        Phase("sparse", args.sparse_steps, max(args.batch_tokens // long, 1), long, "sparse", True),
    ]
    tokens = np.load(args.data / "train.npy")
    held_out, offsets = np.load(args.data / "val.npy"), np.load(args.data / "val_offsets.npy")
    documents = [held_out[a:b] for a, b in itertools.pairwise(offsets) if b - a > 4096]
    print(f"{config.num_parameters():,} parameters, {len(tokens):,} training tokens, {jax.devices()[0].device_kind}")

    log: list[dict] = []
    started = time.perf_counter()
    graphdef, weights = train(config, [p for p in phases if p.steps], tokens, args.learning_rate, args.seed, log)
    trained = time.perf_counter() - started
    # what is saved is what is judged: matrices rounded to bfloat16, routers in float32
    stored = {name: w if "mlp.gate." in name else w.astype(jnp.bfloat16) for name, w in weights.items()}
    results = {mode: evaluate(config, graphdef, stored, documents, mode, long, 2) for mode in ("dense", "sparse")}
    results["sparse_over_dense"] = results["sparse"]["loss"] / results["dense"]["loss"]
    results["sparse_over_dense_past_topk"] = results["sparse"]["loss_past_topk"] / results["dense"]["loss_past_topk"]
    results["busiest_expert_over_mean"] = expert_loads(config, graphdef, stored, documents, long)
    print(json.dumps(results, indent=2))

    save_state(stored, config, args.out, style="vendor")
    shutil.copy(args.data / "tokenizer.json", args.out / "tokenizer.json")
    record = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "seconds": round(trained, 1),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "phases": [dataclasses.asdict(phase) for phase in phases],
        "validation": results,
        "log": log,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
