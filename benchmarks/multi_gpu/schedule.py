"""What XLA has scheduled beside each collective, from compiled HLO. Host code; imports no JAX."""

from __future__ import annotations

import dataclasses
import re

_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COLLECTIVE = re.compile(r"^(all-reduce|all-gather|reduce-scatter|(?:ragged-)?all-to-all|collective-permute)(-start)?$")
_PRODUCT = re.compile(r"gemm|dot|matmul|convolution")
# what launches nothing
_SILENT = ("parameter", "get-tuple-element", "bitcast", "constant", "tuple", "partition-id", "replica-id")


@dataclasses.dataclass(frozen=True)
class Beside:
    """One collective, and what runs while it does.

    Attributes:
      kind: such as "reduce-scatter"; shape: of its result, or of operand and result; asynchronous: whether others can.
      products: matrix products between its start and its end; others: how many other operations.
    """

    kind: str
    shape: str
    asynchronous: bool
    products: tuple[str, ...]
    others: int


def beside_collectives(text: str) -> list[Beside]:
    """The collectives of a scheduled module's entry computation, in order.

    Args:
      text: `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: if the module is not scheduled, so that its order says nothing.
    """
    if "is_scheduled=true" not in text:
        raise ValueError("text: must be of a scheduled module (is_scheduled=true)")
    operations = [match.groups() for line in _entry(text) if (match := _OPERATION.match(line))]
    found = []
    for number, (name, shape, kind, _) in enumerate(operations):
        if (collective := _COLLECTIVE.match(kind)) is None:
            continue
        between: list[tuple[str, str]] = []
        if collective[2]:
            for other, _, other_kind, operands in operations[number + 1 :]:
                if re.search(rf"%?\b{re.escape(name)}\b", operands) and other_kind.endswith("-done"):
                    break
                if other_kind not in _SILENT and not _COLLECTIVE.match(other_kind.removesuffix("-done")):
                    between.append((other, other_kind))
        products = tuple(other for other, other_kind in between if _PRODUCT.search(f"{other} {other_kind}"))
        found.append(Beside(collective[1], shape, bool(collective[2]), products, len(between) - len(products)))
    return found


def _entry(text: str) -> list[str]:
    lines = text[text.index("\nENTRY ") :].splitlines()[2:]
    return lines[: lines.index("}")]
