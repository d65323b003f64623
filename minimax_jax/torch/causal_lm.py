"""MiniMaxM3ForCausalLM that speaks torch throughout: devices, dtypes, weights and results."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch

from minimax_jax import causal_lm
from minimax_jax.torch.tensors import result_on, to_torch


class MiniMaxM3ForCausalLM(causal_lm.MiniMaxM3ForCausalLM):
    """`minimax_jax.MiniMaxM3ForCausalLM` for programs written for transformers: only the import changes.

    Results are torch tensors whatever the ids were, on the ids' device, or on the model's. The weights stay JAX's:
    what `state_dict` and `parameters` give are copies, so that no write to them reaches the model.
    """

    @property
    def dtype(self) -> Any:
        """torch's dtype of matrices and caches."""
        return getattr(torch, self._dtype.name)

    @property
    def device(self) -> Any:
        """The torch device; the first one of a parallel model."""
        if self._device.platform == "gpu":
            return torch.device("cuda", self._device.local_hardware_id or 0)
        return torch.device(self._device.platform)

    def _given_out(self, array: Any) -> Any:
        given = jnp.asarray(array)
        if given.dtype == jnp.float8_e4m3fn:  # which DLPack has no name for everywhere
            return to_torch(jax.lax.bitcast_convert_type(given, jnp.uint8)).clone().view(torch.float8_e4m3fn)
        return to_torch(given).clone()

    def _result(self, given: Any, array: jax.Array) -> Any:
        first = given[0] if isinstance(given, (list, tuple)) and given else given
        return result_on(first.device if isinstance(first, torch.Tensor) else self.device, array)
