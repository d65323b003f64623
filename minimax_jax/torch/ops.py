"""The attention operations of `minimax_kernels` on torch tensors, as custom operators of `torch.library`.

Tensors cross by DLPack: nothing is copied on the way in, and results are JAX's buffers. torch.compile sees one
opaque operator a call, with a fake implementation for shapes. Every operation compiles once for each combination
of shapes and types, as a `jax.jit` does. Gradients do not exist; an operand that needs one is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import torch
from jaxtyping import Float, Int
from torch import Tensor

import minimax_kernels
from minimax_jax.torch.tensors import CACHES, FLOATS, INTEGERS, check_operand, is_aligned, saturated, to_jax, to_torch
from minimax_kernels import Batch, checks

_OPTIONS = ("scale", "topk", "init_blocks", "local_blocks", "impl")
_SELECTION = "int topk, int init_blocks, int local_blocks, "
# operation -> (operands before the batch's, options before `impl`)
_OPERATIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "index_score": (("idx_q", "index_cache"), ""),
    "select_blocks": (("scores",), _SELECTION),
    "dense_attention": (("q", "k_cache", "v_cache"), "float scale, "),
    "sparse_attention": (("q", "k_cache", "v_cache", "selected"), "float scale, "),
    "msa": (("q", "k_cache", "v_cache", "idx_q", "index_cache"), f"float scale, {_SELECTION}"),
}
_KEEPS_ROWS = ("dense_attention", "sparse_attention", "msa")  # with out=, rows without a token keep what they hold
_BATCH = ("block_tables", "query_starts", "kv_lens")


def index_score(
    idx_q: Float[Tensor, "T Hi D"],
    index_cache: Float[Tensor, "P B D"],
    batch: Batch,
    *,
    out: Float[Tensor, "Hi T N"] | None = None,
    impl: str | None = None,
) -> Float[Tensor, "Hi T N"]:
    """`minimax_kernels.index_score` on tensors; float32.

    Args:
      batch: with tensors as its fields.
      out: takes the result and is returned; of its shape, any float type.

    Raises:
      ValueError: for shapes, types, devices or memory layouts that do not fit.
    """
    operands = _operands({"idx_q": idx_q, "index_cache": index_cache}, batch)
    return _run("index_score", operands, out, impl=impl)


def select_blocks(
    scores: Float[Tensor, "Hi T N"],
    batch: Batch,
    *,
    topk: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    out: Int[Tensor, "Hi T topk"] | None = None,
    impl: str | None = None,
) -> Int[Tensor, "Hi T topk"]:
    """`minimax_kernels.select_blocks` on tensors; int32. `out`, of integers, and errors as `index_score`."""
    options = {"topk": topk, "init_blocks": init_blocks, "local_blocks": local_blocks, "impl": impl}
    return _run("select_blocks", _operands({"scores": scores}, batch), out, **options)


def dense_attention(
    q: Float[Tensor, "T Hq D"],
    k_cache: Float[Tensor, "P Hkv B D"],
    v_cache: Float[Tensor, "P Hkv B D"],
    batch: Batch,
    *,
    scale: float,
    out: Float[Tensor, "T Hq D"] | None = None,
    impl: str | None = None,
) -> Float[Tensor, "T Hq D"]:
    """`minimax_kernels.dense_attention` on tensors.

    Args:
      out: takes the result and is returned; of q's shape, any float type; rows without a token keep what they hold.

    Raises:
      ValueError: as `index_score`.
    """
    operands = _operands({"q": q, "k_cache": k_cache, "v_cache": v_cache}, batch)
    return _run("dense_attention", operands, out, scale=scale, impl=impl)


def sparse_attention(
    q: Float[Tensor, "T Hq D"],
    k_cache: Float[Tensor, "P Hkv B D"],
    v_cache: Float[Tensor, "P Hkv B D"],
    selected: Int[Tensor, "Hkv T topk"],
    batch: Batch,
    *,
    scale: float,
    out: Float[Tensor, "T Hq D"] | None = None,
    impl: str | None = None,
) -> Float[Tensor, "T Hq D"]:
    """`minimax_kernels.sparse_attention` on tensors; `out` and errors as `dense_attention`."""
    operands = _operands({"q": q, "k_cache": k_cache, "v_cache": v_cache, "selected": selected}, batch)
    return _run("sparse_attention", operands, out, scale=scale, impl=impl)


def msa(
    q: Float[Tensor, "T Hq D"],
    k_cache: Float[Tensor, "P Hkv B D"],
    v_cache: Float[Tensor, "P Hkv B D"],
    idx_q: Float[Tensor, "T Hi Di"],
    index_cache: Float[Tensor, "P B Di"],
    batch: Batch,
    *,
    scale: float,
    topk: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    out: Float[Tensor, "T Hq D"] | None = None,
    impl: str | None = None,
) -> Float[Tensor, "T Hq D"]:
    """`minimax_kernels.msa` on tensors: score, select and attend in one; `out` and errors as `dense_attention`."""
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "idx_q": idx_q, "index_cache": index_cache}
    selection = {"topk": topk, "init_blocks": init_blocks, "local_blocks": local_blocks}
    return _run("msa", _operands(tensors, batch), out, scale=scale, **selection, impl=impl)


def _operands(tensors: dict[str, Tensor], batch: Batch) -> list[Tensor]:
    """Checks what torch knows; the operation itself checks the rest. Caches are never copied, small operands may be."""
    if not isinstance(batch, Batch):
        raise ValueError(f"batch is {type(batch).__name__}: must be a minimax_kernels.Batch of tensors")
    first = next(iter(tensors.values()))
    device = first.device if isinstance(first, Tensor) else None
    operands: list[Tensor] = []
    for name, tensor in tensors.items():
        is_cache = name.endswith("_cache")
        check_operand(name, tensor, INTEGERS if name == "selected" else CACHES if is_cache else FLOATS, device)
        if is_cache and not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous: must be, as its pages are read where they lie")
        operands.append(_plain(tensor))
    for name in _BATCH:
        tensor = getattr(batch, name)
        check_operand(f"batch.{name}", tensor, INTEGERS, device)
        operands.append(_plain(tensor))
    return operands


def _plain(tensor: Tensor) -> Tensor:
    return (saturated(tensor) if tensor.dtype == torch.int64 else tensor).contiguous()


def _run(name: str, operands: list[Tensor], out: Tensor | None, **options: Any) -> Tensor:
    if "scale" in options:
        options["scale"] = checks.check_scale(options["scale"])
    if out is None:
        return getattr(torch.ops.minimax_jax, name)(*operands, **options)
    shape, dtype = _result(name, operands, options)
    check_operand("out", out, INTEGERS if dtype == torch.int32 else FLOATS, operands[0].device)
    if tuple(out.shape) != shape:  # torch.compile must not resize it, so nobody does
        raise ValueError(f"out has shape {tuple(out.shape)}: must be {shape}, as the result")
    getattr(torch.ops.minimax_jax, f"{name}_out")(*operands, out, **options)
    return out


def _result(name: str, operands: Sequence[Tensor], options: Mapping[str, Any]) -> tuple[tuple[int, ...], Any]:
    """(shape, dtype) of an operation's result."""
    first = operands[0]
    if name == "index_score":
        return (first.shape[1], first.shape[0], operands[-len(_BATCH)].shape[1]), torch.float32
    if name == "select_blocks":
        return (*first.shape[:2], options["topk"]), torch.int32
    return tuple(first.shape), first.dtype


@functools.cache
def _compiled(name: str) -> Callable[..., jax.Array]:
    operation = getattr(minimax_kernels, name)
    options = [option for option in _OPTIONS if option in inspect.signature(operation).parameters]
    return jax.jit(operation, static_argnames=options)


def _call(name: str, tensors: Sequence[Tensor], out: Tensor | None = None, **options: Any) -> Tensor:
    """Runs an operation on real tensors; afterwards, in stream order, JAX holds none of them."""
    names = (*_OPERATIONS[name][0], *_BATCH)
    arrays = [to_jax(_placed(operand, tensor), operand) for operand, tensor in zip(names, tensors, strict=True)]
    batch = Batch(*arrays[-len(_BATCH) :])
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name}: JAX's kernels are not captured in a CUDA graph; call it outside of the capture")
    if tensors[-1].device.type == "cpu":  # lengths can be looked at without waiting for a device
        block_size = next((t.shape[-2] for n, t in zip(names, tensors, strict=True) if n.endswith("_cache")), None)
        checks.check_batch(batch, block_size)
    if out is not None and name in _KEEPS_ROWS:
        options["out"] = to_jax(_placed("out", out.contiguous()), "out")
    return to_torch(_compiled(name)(*arrays[: -len(_BATCH)], batch, **options))


def _placed(name: str, tensor: Tensor) -> Tensor:
    """A small operand where XLA can address it; a cache as it is."""
    return tensor if name.endswith("_cache") or is_aligned(tensor) else tensor.clone()


def _register(name: str) -> None:
    """Defines `torch.ops.minimax_jax.<name>`, and `<name>_out`, which mutates its `out`."""
    operands, options = _OPERATIONS[name]
    tensors = ", ".join(f"Tensor {operand}" for operand in (*operands, *_BATCH))

    def real(*args: Tensor, **kwargs: Any) -> Tensor:
        return _call(name, args, **kwargs)

    def fake(*args: Tensor, **kwargs: Any) -> Tensor:
        shape, dtype = _result(name, args, kwargs)
        return args[0].new_empty(shape, dtype=dtype)

    schema = f"({tensors}, *, {options}str? impl=None) -> Tensor"
    tags = [torch.Tag.cudagraph_unsafe]  # inductor leaves it out of its CUDA graphs
    torch.library.custom_op(f"minimax_jax::{name}", real, mutates_args=(), schema=schema, tags=tags).register_fake(fake)

    def into(*args: Tensor, **kwargs: Any) -> None:
        args[-1].copy_(_call(name, args[:-1], args[-1], **kwargs))

    schema = f"({tensors}, Tensor(a!) out, *, {options}str? impl=None) -> ()"
    torch.library.custom_op(
        f"minimax_jax::{name}_out", into, mutates_args=("out",), schema=schema, tags=tags
    ).register_fake(lambda *args, **kwargs: None)


for _name in _OPERATIONS:  # torch keeps one registry a process; an operator has to be in it before its first call
    _register(_name)
