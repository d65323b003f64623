"""transformers' own model, as it is and with these kernels: logits, tokens, time."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from minimax_jax import MiniMaxM3Config
from minimax_jax.config import DENSE_MLP, FULL_ATTENTION, SPARSE_ATTENTION
from minimax_jax.torch import patch_transformers

IMPLEMENTATIONS = ("eager", "sdpa", "minimax_jax")
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
TIE = 4  # a gap between two logits of so many times transformers' own error there is none
EXACT = 1e-5  # of the logits' spread: float32's own error


def transformers_model(device: torch.device, small: bool) -> Any:
    """One dense and three sparse layers with M3's heads in bfloat16 (a toy in float32); random weights."""
    import transformers

    layers = 4
    sizes: dict[str, Any] = {"hidden_size": 2048, "dense_intermediate_size": 2048, "vocab_size": 4096}
    if small:
        sizes = {
            "hidden_size": 64, "dense_intermediate_size": 96, "vocab_size": 96, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "rotary_dim": 32, "index_n_heads": 2, "index_head_dim": 64,
            "index_block_size": 16, "index_topk_blocks": 3,
        }  # fmt: skip
    config = MiniMaxM3Config(
        num_hidden_layers=layers,
        layer_types=(FULL_ATTENTION,) + (SPARSE_ATTENTION,) * (layers - 1),
        mlp_layer_types=(DENSE_MLP,) * layers,
        **sizes,
    )
    with torch.device(device):
        model = transformers.MiniMaxM3VLForCausalLM(
            transformers.MiniMaxM3VLTextConfig(**config.to_dict("transformers"))
        ).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            noise = torch.randn(tensor.shape, generator=generator, device=device)
            tensor.copy_(noise * (0.4 if tensor.ndim == 1 else 1.5 * tensor.shape[-1] ** -0.5))
    return model if small else model.to(torch.bfloat16)


def with_attention(model: Any, implementation: str) -> Any:
    """The model, attending so."""
    if implementation == "minimax_jax":
        return patch_transformers(model)
    model.set_attn_implementation(implementation)
    return model


def prompt(model: Any, length: int, seed: int = 0) -> Any:
    """[1, length] ids, none of them the pad token."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(1, model.config.vocab_size, (1, length), generator=generator, device=device)


@torch.no_grad()
def logits(device: torch.device, small: bool) -> dict[str, Any]:
    """Each token's error against the same weights in float32: ours no worse than transformers' own."""
    model = transformers_model(device, small)
    ids = prompt(model, 100 if small else 4096)
    wide = with_attention(copy.deepcopy(model).float(), "sdpa")(ids, use_cache=False).logits
    spread = wide.std()
    errors = {}
    for implementation in IMPLEMENTATIONS:
        found = with_attention(model, implementation)(ids, use_cache=False).logits.float()
        errors[implementation] = ((found - wide) / spread).square().mean(-1).sqrt().median().item()
    limit = max(1.2 * max(errors["eager"], errors["sdpa"]), EXACT)
    return {"ok": errors["minimax_jax"] <= limit, "tokens": ids.shape[1], "dtype": str(model.dtype), "errors": errors}


@torch.no_grad()
def tokens(device: torch.device, small: bool, prompts: int = 3) -> dict[str, Any]:
    """Greedy tokens are those of transformers' sdpa, up to the first place where float32 sees no difference.

    At a parting the same weights in float32 say how far apart the two tokens are. They tie if that is at most `TIE`
    times the error of eager's or sdpa's logits against float32's in the same place; two logits' difference has 1.4
    times the error of one. Where eager parts from sdpa, with its gap, is reported beside it.
    """
    model = transformers_model(device, small)
    wide = with_attention(copy.deepcopy(model).float(), "sdpa")
    length, count = (60, 12) if small else (2500, 32)
    found = []
    for seed in range(prompts):
        ids = prompt(model, length, seed)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, **GREEDY}
        chosen = {name: with_attention(model, name).generate(ids, **options)[0] for name in IMPLEMENTATIONS}
        row = {name: parting(model, wide, chosen[name], chosen["sdpa"], length) for name in ("eager", "minimax_jax")}
        found.append(row)
    return {"ok": all(row["minimax_jax"].get("tie", True) for row in found), "new_tokens": count, "prompts": found}


def parting(model: Any, wide: Any, ours: Any, theirs: Any, length: int) -> dict[str, Any]:
    """How many new tokens are the same and, where they part, what float32 and each implementation say.

    Args:
      wide: the model in float32.
      ours, theirs: ids with the prompt in front.
      length: of the prompt.

    Returns:
      same; at a parting also gap (of float32's logits for the two tokens), errors (root mean square of each
      implementation's logits), both in the spread of float32's logits, and tie.
    """
    differ = (ours != theirs).nonzero()
    if not len(differ):
        return {"same": len(theirs) - length}
    first = int(differ[0])

    def last(which: Any) -> Any:
        return which(theirs[None, :first], use_cache=False, logits_to_keep=1).logits[0, -1].float()

    exact = last(wide)
    spread = exact.std()
    gap = ((exact[theirs[first]] - exact[ours[first]]).abs() / spread).item()
    errors = {
        name: ((last(with_attention(model, name)) - exact) / spread).square().mean().sqrt().item()
        for name in IMPLEMENTATIONS
    }
    tie = gap <= max(TIE * max(errors["eager"], errors["sdpa"]), EXACT)
    return {"same": first - length, "gap": gap, "errors": errors, "tie": tie}


def seconds(device: torch.device, call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """(first call, median of the later ones), wall time with the device's work."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = once()
    return first, statistics.median(once() for _ in range(repeats))


@torch.no_grad()
def speed(device: torch.device, small: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds at 8K tokens of context: one sparse layer's attention, prefill of the model, a token of decode."""
    model = transformers_model(device, small)
    length, steps = (128, 4) if small else (8192, 16)
    ids = prompt(model, length)
    table: dict[str, Any] = {"context": length, "layers": model.config.num_hidden_layers, "milliseconds": {}}
    for implementation in IMPLEMENTATIONS:
        with_attention(model, implementation)
        row: dict[str, Any] = {}
        mask = torch.ones_like(ids)

        def generate(count: int, mask: Any = mask) -> Any:
            return model.generate(ids, attention_mask=mask, max_new_tokens=count, **GREEDY)

        calls: dict[str, Callable[[], Any]] = {
            "sparse attention": attention_call(model, implementation, length),
            "prefill": lambda: model(ids, use_cache=False, logits_to_keep=1),
            "first token": lambda: generate(1),
            "more tokens": lambda: generate(1 + steps),
        }
        for name, call in calls.items():
            try:
                first, again = seconds(device, call, 2 if small else 3)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                row[name] = "out of memory"
                continue
            row[name], row[f"{name}, first call"] = 1e3 * again, 1e3 * first
            say(f"{implementation}: {name} {1e3 * again:.2f} ms (first call {first:.1f} s)")
        both = row.pop("more tokens", None), row["first token"]
        row.pop("more tokens, first call", None)
        if all(isinstance(value, float) for value in both):
            row["decode, a token"] = (both[0] - both[1]) / steps
        table["milliseconds"][implementation] = row
    return {"ok": "prefill" in table["milliseconds"]["minimax_jax"], **table}


def attention_call(model: Any, implementation: str, length: int) -> Callable[[], Any]:
    """One sparse layer's attention over `length` new tokens with blocks already selected, masks included."""
    import sys

    from transformers import AttentionInterface

    layer = model.model.layers[1].self_attn
    config, parameter = model.config, next(model.parameters())
    q, k, v = (
        torch.randn(1, heads, length, config.head_dim, device=parameter.device, dtype=parameter.dtype)
        for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    positions = torch.arange(length, device=parameter.device)[None]
    own = positions[0] // config.index_block_size
    blocks = own[:, None] - torch.arange(config.index_topk_blocks, device=parameter.device)
    blocks = blocks.clamp(min=-1).expand(1, config.index_n_heads, -1, -1)
    eager = sys.modules[type(layer).__module__].eager_attention_forward
    function = AttentionInterface().get_interface(implementation, eager)

    def call() -> Any:
        mask = None
        if implementation != "minimax_jax":
            mask = layer.indexer.build_block_mask(blocks, None, length, q.dtype, q.device, positions)
        return function(layer, q, k, v, mask, scaling=layer.scaling, block_indices=blocks)

    return call
