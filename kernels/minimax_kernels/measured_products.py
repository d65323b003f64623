"""Launch parameters of products by shape, written by scripts/bench_products.py: change it there.

Keys are (kind, weight, groups, inputs, columns, rows): "mxfp8" or "bf16"; rows of all groups, rounded up to a power of
two.
Values are (block_m, block_n, block_k, splits, warps, stages, ahead).

Latest on NVIDIA H100 80GB HBM3, driver 580.159.04, jax 0.11.2, 2026-11-25 08:54 UTC.
"""

Table = dict[tuple[str, str, int, int, int, int], tuple[int, int, int, int, int, int, int]]

PRODUCTS: Table = {
    ("matmul", "mxfp8", 1, 1024, 6144, 1): (64, 64, 128, 1, 4, 3, 0),
    ("matmul", "mxfp8", 1, 6144, 768, 1): (16, 64, 64, 16, 4, 4, 0),
    ("matmul", "mxfp8", 1, 6144, 1536, 1): (16, 64, 64, 16, 4, 4, 0),
}
