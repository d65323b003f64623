"""What a call of the model gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from minimax_jax.cache import PastKeyValues


@dataclasses.dataclass(frozen=True)
class CausalLMOutput:
    """Named results with transformers' names; also by key, by position, and as a tuple of those that are there.

    All arrays are torch tensors if the ids were, else JAX arrays. R rows, L columns, K of them with logits.

    Attributes:
      logits: [R, K, V] float32; zeros where the attention mask is 0.
      loss: scalar float32, if labels were given.
      aux_loss: scalar float32, the experts' load balancing loss, with `router_logits`.
      past_key_values: the context after this call, if it was kept.
      hidden_states: [R, L, H] what each layer was given, and last what the head sees (after the final norm).
      router_logits: [R * L, E] float32 of each layer with experts.
    """

    logits: Any
    loss: Any = None
    aux_loss: Any = None
    past_key_values: PastKeyValues | None = None
    hidden_states: tuple[Any, ...] | None = None
    router_logits: tuple[Any, ...] | None = None

    @property
    def cache(self) -> PastKeyValues | None:
        """`past_key_values` by transformers' newer name, which is a key too."""
        return self.past_key_values

    def keys(self) -> tuple[str, ...]:
        """Names of what is there, in transformers' order."""
        return tuple(name for name in _ORDER if getattr(self, name) is not None)

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there, in the order of `keys`."""
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(f"{key!r}: must be one of {', '.join(map(repr, self.keys()))}")
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return ("past_key_values" if key == "cache" else key) in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


_ORDER = ("loss", "aux_loss", "logits", "past_key_values", "hidden_states", "router_logits")
