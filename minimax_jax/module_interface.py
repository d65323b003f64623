"""What torch's users expect of a module, for weights that are JAX arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from minimax_jax.config import MiniMaxM3Config
from minimax_jax.parallel import Ranks
from minimax_jax.state_dict import BUFFERS, IncompatibleKeys, named_tensors, state_from
from minimax_jax.tensor_table import SCALE_SUFFIX
from minimax_kernels import Mxfp8


class ModuleInterface:
    """The methods of `torch.nn.Module` that a model of frozen arrays has; tensors are JAX arrays, names torch's.

    Attributes:
      training: False; gradients are JAX's affair, by way of `minimax_jax.model`.
    """

    config: MiniMaxM3Config
    ranks: Ranks | None
    training = False
    _names: tuple[str, ...]
    _leaves: list[Any]

    def state(self) -> dict[str, Any]:
        """Weights by dotted name, matrices [in, out]; of a parallel model copies on the host, as NumPy arrays.

        Weights in 8 bits are `Mxfp8`, whose inputs are in an order of their own; `state_dict` has a checkpoint's.
        """
        if (ranks := self.ranks) is not None:
            return {name: ranks.whole(name, leaf) for name, leaf in zip(self._names, self._leaves, strict=True)}
        return dict(zip(self._names, self._leaves, strict=True))

    @property
    def dtype(self) -> Any:
        """Of matrices and caches."""
        return self._dtype

    @property
    def _dtype(self) -> np.dtype:
        return self._leaves[self._names.index("embed_tokens")].dtype

    @property
    def device(self) -> Any:
        """The JAX device; the first one of a parallel model."""
        return self._device

    @property
    def _device(self) -> jax.Device:
        return min(self._leaves[0].devices(), key=lambda device: device.id)

    def state_dict(self, *, style: str = "transformers") -> dict[str, Any]:
        """All weights and buffers, linears [out, in]; matrices are copies.

        Weights in 8 bits come as the vendor's files have them: float8_e4m3fn values under the weight's name, and uint8
        scales [out, in / 32] under the same with "_scale_inv" behind it.

        Args:
          style: "transformers" or "vendor", as files name them.

        Raises:
          ValueError: for another style.
        """
        return {name: self._given_out(array) for name, array in named_tensors(self.state(), self.config, style)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Replaces weights by copies of torch, NumPy or JAX tensors, named in either style.

        Each weight stays in the form it has: floats given for one in 8 bits are quantised, values with scales given for
        one in floats are multiplied out.

        Args:
          strict: whether a name too few or too many is an error; else weights without a tensor stay.

        Returns:
          (missing_keys, unexpected_keys).

        Raises:
          RuntimeError: as torch does, for names or shapes that do not fit; nothing has changed then.
          ValueError: if no name is one of a MiniMax-M3.
        """
        values, keys = state_from(state_dict, self.state(), self.config, strict=strict)

        def replaced(name: str, leaf: Any) -> Any:
            if name not in values:
                return leaf
            host = jax.tree.map(lambda new, old: new.astype(old.dtype), values[name], leaf)
            if self.ranks is not None:
                return self.ranks.put(name, host)
            return jax.device_put(host, jax.tree.map(lambda old: old.sharding, leaf), may_alias=False)

        self._leaves[:] = [replaced(name, leaf) for name, leaf in zip(self._names, self._leaves, strict=True)]
        return keys

    def named_parameters(self, *, style: str = "transformers") -> Iterator[tuple[str, Any]]:
        """(name, tensor) of each weight; matrices are copies that are made when their turn comes."""
        for name, array in named_tensors(self.state(), self.config, style):
            if not name.endswith((*BUFFERS, SCALE_SUFFIX)) and not (
                self.config.tie_word_embeddings and name.endswith("lm_head.weight")
            ):
                yield name, self._given_out(array)

    def parameters(self) -> Iterator[Any]:
        """The tensors of `named_parameters`."""
        return (tensor for _, tensor in self.named_parameters())

    def named_buffers(self, *, style: str = "transformers") -> Iterator[tuple[str, Any]]:
        """(name, tensor) of what training does not learn: the routers' correction biases, and scales of MXFP8."""
        for name, array in named_tensors(self.state(), self.config, style):
            if name.endswith((*BUFFERS, SCALE_SUFFIX)):
                yield name, self._given_out(array)

    def buffers(self) -> Iterator[Any]:
        """The tensors of `named_buffers`."""
        return (tensor for _, tensor in self.named_buffers())

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of weights and, if `return_buffers`, of buffers (MXFP8's scales too), of all devices together."""
        if return_buffers:
            return sum(array.nbytes for array in jax.tree.leaves(self._leaves))
        leaves = [leaf for name, leaf in zip(self._names, self._leaves, strict=True) if not name.endswith(BUFFERS)]
        return sum((leaf.values if isinstance(leaf, Mxfp8) else leaf).nbytes for leaf in leaves)

    @classmethod
    def can_generate(cls) -> bool:
        """True."""
        return True

    def eval(self) -> Self:
        """The same model: it is never in another mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """The same model, for `mode` False.

        Raises:
          ValueError: for a training mode, which there is none of.
        """
        if mode:
            raise ValueError("mode = True: must be False; train the modules of minimax_jax.model with JAX's gradients")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """The same model, for `requires_grad` False; raises as `train`."""
        return self.train(requires_grad)

    def to(self, *targets: Any, dtype: Any = None, device: Any = None, non_blocking: bool = False) -> Self:
        """Casts or moves the weights, in place as torch's modules do; the routers stay float32, 8 bits stay 8 bits.

        Args:
          targets: a dtype, a device, or one of each, in any order.
          dtype: "bfloat16" or "float32", by name or as torch's, NumPy's or JAX's type.
          device: JAX's or torch's, a name ("cpu", "cuda", "cuda:1"), or the number of a CUDA device.
          non_blocking: changes nothing, as JAX never waits for a copy.

        Returns:
          The same model.

        Raises:
          ValueError: for another dtype, a device that is not there, or a device for a parallel model.
        """
        for target in targets:
            if isinstance(target, (jax.Device, int)) or str(target).partition(":")[0] in ("cpu", "cuda", "gpu", "tpu"):
                device = target
            else:
                dtype = target
        if device is not None and self.ranks is not None:
            raise ValueError(f"device = {device!r}: must not be given for a parallel model, whose mesh has its devices")
        place = None if device is None else find_device(device)
        wanted = None if dtype is None else dtype_name(dtype)

        def moved(name: str, leaf: Any) -> Any:
            stays = wanted is None or ".mlp.gate." in name or isinstance(leaf, Mxfp8)
            leaf = leaf if stays else leaf.astype(wanted)
            return leaf if place is None else jax.device_put(leaf, place)

        self._leaves[:] = [moved(name, leaf) for name, leaf in zip(self._names, self._leaves, strict=True)]
        return self

    def float(self) -> Self:
        """`to("float32")`."""
        return self.to("float32")

    def bfloat16(self) -> Self:
        """`to("bfloat16")`."""
        return self.to("bfloat16")

    def cpu(self) -> Self:
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self, device: Any = None) -> Self:
        """`to` a CUDA device, by number or as `to` takes it; the first one if None."""
        return self.to(0 if device is None else device)

    def _given_out(self, array: Any) -> Any:
        """A weight as `state_dict` and `parameters` give it."""
        return array


def dtype_name(dtype: Any) -> str:
    """ "bfloat16" or "float32" from any library's spelling.

    Raises:
      ValueError: for another dtype.
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, str) or "torch" in str(type(dtype)) else None
    try:
        name = name or jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in ("bfloat16", "float32"):
        raise ValueError(f"dtype = {dtype!r}: must be 'auto', 'bfloat16' or 'float32'")
    return name


def find_device(device: Any) -> jax.Device | jax.sharding.Sharding:
    """A JAX device from JAX's own, torch's, a name such as "cpu", "cuda" and "cuda:1", or a CUDA device's number.

    Raises:
      ValueError: if there is none.
    """
    if isinstance(device, (jax.Device, jax.sharding.Sharding)):
        return device
    if isinstance(device, int):
        device = f"cuda:{device}"
    kind, _, number = str(device).partition(":")
    try:
        return jax.devices(kind)[int(number or 0)]
    except (RuntimeError, IndexError, ValueError):
        found = ", ".join(f"{d.platform}:{d.id}" for d in jax.devices())
        raise ValueError(f"device = {str(device)!r}: must be one of JAX's devices ({found}, and 'cpu')") from None
