"""What compiled HLO says between devices."""

import math
import re

import numpy as np

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


def replica_groups(text):
    """(kind, groups of ranks) of each, groups as tuples."""
    found = []
    for line in text.splitlines():
        if (match := COLLECTIVE.search(line)) is None:
            continue
        if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
            groups = [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
        elif by_axes := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):  # of a mesh, along axes
            sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", by_axes[1])}
            along = re.findall(r"'(\w+)'", by_axes[2])
            names = [*(name for name in sizes if name not in along), *along]
            ranks = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
            ranks = ranks.transpose([list(sizes).index(name) for name in names])
            groups = [tuple(group) for group in ranks.reshape(-1, math.prod(sizes[name] for name in along)).tolist()]
        else:  # in short: [groups, size]<=[shape]T(order)
            short = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
            shape, dims, order = ([int(x) for x in part.split(",")] if part else None for part in short.groups())
            ranks = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
            groups = [tuple(group) for group in ranks.tolist()]
        found.append((match[2], tuple(groups)))
    return found
