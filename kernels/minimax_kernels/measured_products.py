"""Launch parameters of products by shape, written by scripts/bench_products.py: change it there.

Keys are (kind, weight, groups, inputs, columns, rows): "mxfp8" or "bf16"; rows of all groups, rounded up to a power of
two.
Values are (block_m, block_n, block_k, splits, warps, stages).

Nothing has been measured since MXFP8 weights lie with their inputs next to each other: formulas serve.
"""

Table = dict[tuple[str, str, int, int, int, int], tuple[int, int, int, int, int, int]]

PRODUCTS: Table = {}
