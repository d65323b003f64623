"""What compiled HLO says between devices."""

import math
import re

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|(?:ragged-)?all-to-all|collective-\w+)(?:-start)?\("
)


def collectives(text):
    """(kind, elements of the result) of each; of a tuple, those of its largest element."""
    found = []
    for shapes, kind in COLLECTIVE.findall(text):
        sizes = [math.prod(map(int, dims.split(","))) if dims else 1 for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        found.append((kind, max(sizes)))
    return found
