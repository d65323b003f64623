"""What a caller may ask of the layers on their way."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float


@dataclasses.dataclass
class ForwardRecord:
    """Filled by `MiniMaxM3.run_layers`; lives for one trace, in which only what is used costs anything.

    Attributes:
      hidden_states: [T, H] what each layer was given, then what the last one gave, before the final norm.
      router_logits: [T, E] float32 of each layer with experts, before the sigmoid.
    """

    hidden_states: list[Float[Array, "T H"]] = dataclasses.field(default_factory=list)
    router_logits: list[Float[Array, "T E"]] = dataclasses.field(default_factory=list)
