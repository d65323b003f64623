"""vLLM's Triton kernels for MiniMax-M3, from its sources alone: vLLM itself need not be installed or built.

They take torch tensors: caches of [P, Hkv, 128, 2 D] (keys, then values) and [P, 128, D], selections [Hi, T, topk].
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

FOLDER = "vllm/models/minimax_m3/common/ops"


@dataclasses.dataclass(frozen=True)
class VllmKernels:
    """Its host functions, by what they do here.

    Attributes:
      version: of the sources.
      prefill_score, prefill_select: index scores of every visible block, and the selection from them.
      decode_score: index scores of one query a request.
      decode_index: those and the selection.
      prefill_attention, decode_attention: over selected blocks, into `output`.
    """

    version: str
    prefill_score: Callable[..., Any]
    prefill_select: Callable[..., Any]
    decode_score: Callable[..., Any]
    decode_index: Callable[..., Any]
    prefill_attention: Callable[..., Any]
    decode_attention: Callable[..., Any]


def load(sources: Path) -> VllmKernels:
    """The kernels of a folder of vLLM's sources (an unpacked `vllm-0.33.0.tar.gz`).

    Raises:
      ValueError: the folder has no such kernels.
      ImportError: Triton is missing.
    """
    folder = sources / FOLDER
    missing = [name for name in ("index_topk.py", "sparse_attn.py") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"sources = {sources}: has no {FOLDER}/{missing[0]}; unpack vLLM's source distribution there")
    with _stand_ins():
        index, attention = _module(folder / "index_topk.py"), _module(folder / "sparse_attn.py")
    return VllmKernels(
        version=_version(sources),
        prefill_score=index.minimax_m3_index_score,
        prefill_select=index.minimax_m3_index_topk,
        decode_score=index.minimax_m3_index_decode_score,
        decode_index=index.minimax_m3_index_decode,
        prefill_attention=attention.minimax_m3_sparse_attn,
        decode_attention=attention.minimax_m3_sparse_attn_decode,
    )


def _version(sources: Path) -> str:
    for line in _text(sources / "PKG-INFO").splitlines():
        if line.startswith("Version: "):
            return line.removeprefix("Version: ")
    return "unknown"


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


class _Platform:
    """What those two files ask about the device."""

    @staticmethod
    def is_cuda() -> bool:
        return torch.cuda.is_available()

    @staticmethod
    def is_device_capability(capability: tuple[int, int]) -> bool:
        return torch.cuda.is_available() and torch.cuda.get_device_capability() == capability

    @staticmethod
    def is_arch_support_pdl() -> bool:
        return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Modules in the place of the three of vLLM that those files import, while they are loaded."""
    import triton
    import triton.language as tl

    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.platforms": {"current_platform": _Platform},
        "vllm.triton_utils": {"triton": triton, "tl": tl},
        "vllm.utils": {},
        "vllm.utils.math_utils": {"round_up": lambda x, multiple: -(-x // multiple) * multiple},
    }
    before = {name: sys.modules.get(name) for name in contents}
    for name, attributes in contents.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _module(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"vllm_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
