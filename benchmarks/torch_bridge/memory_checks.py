"""Addresses and streams: nothing is copied, nothing is read before it is written or after it is written over."""

from __future__ import annotations

from typing import Any

import jax
import torch

from benchmarks.torch_bridge.operands import msa_operands, msa_options
from minimax_jax.torch import msa, to_jax, to_torch, write_kv

TRIALS = 40
BIG_PAGES = 8192  # of M3's caches: 1 GiB of keys and as much of values


def addresses(device: torch.device, small: bool) -> dict[str, Any]:
    """Tensors and arrays share memory both ways, and a call over big caches takes little memory of its own."""
    operands, batch = msa_operands(device, small=small, num_pages=None if small else BIG_PAGES)
    inward = {name: to_jax(t).unsafe_buffer_pointer() == t.data_ptr() for name, t in operands.items()}
    array = jax.numpy.ones((64, 64)) + to_jax(torch.ones(64, 64, device=device))
    outward = to_torch(array).data_ptr() == array.unsafe_buffer_pointer()
    before = operands["k_cache"].clone()
    pointers = [operands[name].data_ptr() for name in ("k_cache", "v_cache", "index_cache")]
    heads, dim = operands["k_cache"].shape[1], operands["k_cache"].shape[3]
    rows = torch.ones(4, heads, dim, device=device, dtype=before.dtype)
    slots = torch.tensor([0, -1, 5, 7], dtype=torch.int32, device=device)
    write_kv(operands["k_cache"], operands["v_cache"], rows, rows, slots)
    written = bool((operands["k_cache"][0, :, [0, 5, 7]] == 1).all()) and not torch.equal(before, operands["k_cache"])
    del before
    msa(*operands.values(), batch, **msa_options(small=small))
    in_place = pointers == [operands[name].data_ptr() for name in ("k_cache", "v_cache", "index_cache")]
    found: dict[str, Any] = {"inward": inward, "outward": outward, "writes": written, "in_place": in_place}
    cache_bytes = sum(operands[name].nbytes for name in ("k_cache", "v_cache", "index_cache"))
    stats = jax.devices()[0].memory_stats() if device.type == "cuda" else None
    if stats:
        found["cache_bytes"], found["jax_peak_bytes"] = cache_bytes, stats["peak_bytes_in_use"]
    copied = bool(stats) and stats["peak_bytes_in_use"] >= operands["k_cache"].nbytes
    return {"ok": all(inward.values()) and outward and written and in_place and not copied, **found}


def streams(device: torch.device, small: bool) -> dict[str, Any]:
    """Calls on a side stream, behind work that takes long, in front of writes to what they read and gave."""
    operands, batch = msa_operands(device, small=small)
    options = msa_options(small=small)
    q, rest = operands["q"], list(operands.values())[1:]
    source, other = q.clone(), torch.randn_like(q)
    expected = msa(q, *rest, batch, **options).clone()
    expected_other = msa(other, *rest, batch, **options).clone()
    slow = torch.randn((64, 64) if small else (8192, 8192), device=device, dtype=q.dtype)
    side = torch.cuda.Stream() if device.type == "cuda" else None
    wrong = dict.fromkeys(("read too early", "read after a later write", "result freed too early", "second call"), 0)
    with torch.cuda.stream(side):
        for _ in range(TRIALS):
            q.fill_(float("nan"))
            delay = (slow @ slow)[0, 0] * 0
            q.copy_(source + delay)
            result = msa(q, *rest, batch, **options)
            q.fill_(float("nan"))  # must come after the call has read it
            early = result + 0
            late = result + (slow @ slow)[0, 0] * 0  # reads the result long after the next line
            del result
            second = msa(other * 1, *rest, batch, **options)  # JAX may reuse the result's memory: not yet
            torch.full_like(q, float("nan"))  # torch may reuse the temporary's memory: not yet
            if side is not None:
                side.synchronize()
            wrong["read too early"] += int(bool(early.isnan().any()))
            wrong["read after a later write"] += int(not torch.equal(early, expected))
            wrong["result freed too early"] += int(not torch.equal(late, expected))
            wrong["second call"] += int(not torch.equal(second, expected_other))
    return {"ok": not any(wrong.values()), "trials": TRIALS, "wrong": wrong}


class Layer(torch.nn.Module):
    """Cache writes and attention between ordinary torch operations."""

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        self.options = options

    def forward(self, operands: dict[str, Any], batch: Any, rows: Any, slots: Any) -> Any:
        """[T, Hq, D]."""
        write_kv(operands["k_cache"], operands["v_cache"], rows, rows, slots)
        return torch.relu(msa(*operands.values(), batch, **self.options)) + 1


def compiled(device: torch.device, small: bool) -> dict[str, Any]:
    """`torch.compile(fullgraph=True)` over such a module, and `torch.library.opcheck` of the operation."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    layer = Layer(msa_options(small=small))
    results, caches = [], []
    for run in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        operands, batch = msa_operands(device, small=small)
        tokens, heads, dim = operands["q"].shape[0], operands["k_cache"].shape[1], operands["q"].shape[2]
        rows = torch.ones(tokens, heads, dim, device=device, dtype=operands["q"].dtype)
        results.append(run(operands, batch, rows, torch.arange(tokens, device=device) - 1))
        caches.append(operands["k_cache"])
    raw = (*operands.values(), batch.block_tables, batch.query_starts, batch.kv_lens)
    options = {**msa_options(small=small), "init_blocks": 0, "local_blocks": 1}
    checks = torch.library.opcheck(torch.ops.minimax_jax.msa, raw, options)
    same = torch.equal(results[0], results[1]) and torch.equal(caches[0], caches[1])
    return {"ok": same and set(checks.values()) == {"SUCCESS"}, "backend": backend, "same": same, "opcheck": checks}
