"""torch tensors as JAX arrays and back, without a copy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CACHES = (*FLOATS, torch.float8_e4m3fn)
INTEGERS = (torch.int32, torch.int64)
# Bytes that addresses must be multiples of: on a CPU XLA copies what is not, on CUDA its kernels take it for granted.
_ALIGNMENT = {"cpu": 64, "cuda": 16}


def check_operand(name: str, tensor: Any, dtypes: tuple[Any, ...], device: Any = None) -> None:
    """ValueError unless an operand is a tensor of one of `dtypes`, dense, on `device` (if given), without gradient."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {type(tensor).__name__}: must be a torch tensor")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} is {_short(tensor.layout)}: must be a dense tensor")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {_short(tensor.dtype)}: must be one of {', '.join(map(_short, dtypes))}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}: must be on {device}, as the other operands")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad: these operations have no gradient; call them under torch.no_grad() or detach it"
        )


def to_jax(tensor: Tensor, name: str = "tensor") -> jax.Array:
    """A JAX array over a tensor's own memory (DLPack); on CUDA, JAX's stream waits for torch's current one.

    The array must not outlive the next write to the tensor: JAX takes arrays to be constant.

    Args:
      tensor: contiguous, aligned, float32, bfloat16, float16, float8_e4m3fn, int32 or bool, or int64, which is copied
        to int32 (a look at its values waits for the device).
      name: for messages.

    Raises:
      ValueError: for what has no array without a copy: another type, layout or device; integers beyond int32.
    """
    check_operand(name, tensor, (*CACHES, *INTEGERS, torch.bool))
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}): must be; .contiguous() makes a copy")
    _check_device(name, tensor)
    if not is_aligned(tensor):
        raise ValueError(
            f"{name} starts off a multiple of {_ALIGNMENT[tensor.device.type]} bytes: must be aligned, for XLA; "
            ".clone() makes a copy"
        )
    given = tensor.detach()
    if given.dtype == torch.int64:
        beyond = given[given != saturated(given)]
        if beyond.numel():
            raise ValueError(f"{name} holds {int(beyond[0])}: must fit int32, which JAX has for int64")
        given = saturated(given)
    return jax.dlpack.from_dlpack(given)


def saturated(tensor: Tensor) -> Tensor:
    """int64 as int32; what is beyond it becomes the nearest int32, not one that happens to fit."""
    limits = torch.iinfo(torch.int32)
    return tensor.clamp(limits.min, limits.max).to(torch.int32)


def is_aligned(tensor: Tensor) -> bool:
    """Whether XLA can use a tensor's memory as it is; a view into another tensor may start anywhere."""
    return tensor.numel() == 0 or tensor.data_ptr() % _ALIGNMENT.get(tensor.device.type, 1) == 0


def to_torch(array: jax.Array) -> Tensor:
    """A tensor over an array's own memory (DLPack); on CUDA, torch's current stream waits for the array.

    Writing to the tensor changes the array, so nobody must use the array after that.

    Raises:
      ValueError: for an array that is spread over several devices.
    """
    if len(array.devices()) > 1:
        raise ValueError(f"array is on {len(array.devices())} devices: must be on one")
    if next(iter(array.devices())).platform == "cpu":
        array.block_until_ready()  # a CPU tensor has no stream that could wait
    return torch.from_dlpack(array)


def result_on(device: torch.device, array: jax.Array) -> Tensor:
    """A result of the model as a tensor on a torch device: without a copy where it lies there; int32 ids as int64."""
    platform = next(iter(array.devices())).platform
    near = device.type == ("cuda" if platform == "gpu" else platform) and len(array.devices()) == 1
    if near:
        tensor = to_torch(array)
    elif array.dtype == jnp.bfloat16:  # NumPy has no such type of its own
        tensor = torch.from_numpy(np.array(array).view(np.uint16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(np.array(array))
    return tensor.to(device, torch.int64 if tensor.dtype == torch.int32 else tensor.dtype)


def _check_device(name: str, tensor: Tensor) -> None:
    kind = tensor.device.type
    if kind == "cuda":
        try:
            jax.devices("cuda")
        except RuntimeError:
            raise ValueError(
                f"{name} is on {tensor.device}: JAX sees no CUDA device; install minimax-jax[cuda12] or [cuda13]"
            ) from None
    elif kind != "cpu":
        raise ValueError(f"{name} is on {tensor.device}: must be on a CPU or a CUDA device")


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
