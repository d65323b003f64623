"""The model itself with torch's ids: where results lie, and that turns are one pass."""

from __future__ import annotations

from typing import Any

import torch

from minimax_jax import MiniMaxM3Config
from minimax_jax.config import DENSE_MLP, FULL_ATTENTION, MOE_MLP, SPARSE_ATTENTION
from minimax_jax.torch import MiniMaxM3ForCausalLM


def model(device: torch.device, small: bool) -> dict[str, Any]:
    """Two layers, the second sparse with experts: turns over a context against one pass, logits against float32's."""
    length, turns = (60, (40, 1, 19)) if small else (1500, (1000, 1, 499))
    tiny = MiniMaxM3Config.from_pretrained("tiny")
    kinds = {"layer_types": (FULL_ATTENTION, SPARSE_ATTENTION), "mlp_layer_types": (DENSE_MLP, MOE_MLP)}
    config = tiny.replace(num_hidden_layers=2, **kinds)
    found = MiniMaxM3ForCausalLM.from_config(config, "float32" if small else "bfloat16").to(device)
    exact = MiniMaxM3ForCausalLM.from_config(config).cpu()
    exact.load_state_dict(found.state_dict())
    ids = torch.randint(1, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    wide = exact(ids[:, :60]).logits  # the first tokens: beyond them, bfloat16 may choose other blocks
    near = ids.to(device)
    whole = found(near, output_hidden_states=True, labels=near)
    error = (whole.logits[:, :60].cpu() - wide).square().mean(-1).sqrt().median() / wide.std()
    past, parts, at = None, [], 0
    for turn in turns:
        out = found(near[:, at : at + turn], past_key_values=past, use_cache=True)
        past, at = out.past_key_values, at + turn
        parts.append(out.logits)
    spread = whole.logits.std()
    later = torch.cat(parts[1:], dim=1) - whole.logits[:, turns[0] :]  # the turns that have a context before them
    apart = (later.square().mean(-1).sqrt().median() / spread).item()
    devices = {str(tensor.device) for tensor in (whole.loss, whole.logits, *whole.hidden_states, *parts)}
    tokens = found.generate(near[:, :60], max_new_tokens=8)
    right = devices == {str(near.device)} == {str(found.device)} == {str(tokens.device)}
    return {
        "ok": bool(right and apart <= 3e-2 and error <= 3e-2),
        "dtype": str(found.dtype),
        "devices": sorted(devices),
        "turns_to_one_pass": apart,
        "error_of_logits": error.item(),
        "loss": whole.loss.item(),
    }
