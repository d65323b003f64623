"""Launch parameters of products by shape, written by scripts/bench_products.py: change it there.

Keys are (kind, weight, groups, inputs, columns, rows): "mxfp8" or "bf16"; rows of all groups, rounded up to a power of
two.
Values are (block_m, block_n, block_k, splits, warps, stages).

Latest on NVIDIA H200, driver 580.159.04, jax 0.11.2, 2026-11-30 10:16 UTC.
"""

Table = dict[tuple[str, str, int, int, int, int], tuple[int, int, int, int, int, int]]

PRODUCTS: Table = {
    ("groups", "mxfp8", 16, 3072, 6144, 1): (16, 64, 256, 4, 4, 3),
    ("groups", "mxfp8", 16, 3072, 6144, 16): (16, 64, 256, 1, 4, 3),
    ("groups", "mxfp8", 16, 3072, 6144, 32): (16, 64, 256, 1, 4, 3),
    ("groups", "mxfp8", 16, 3072, 6144, 4096): (128, 128, 64, 1, 4, 3),
    ("joined", "mxfp8", 16, 6144, 6144, 1): (16, 64, 256, 4, 4, 3),
    ("joined", "mxfp8", 16, 6144, 6144, 16): (16, 32, 256, 1, 4, 3),
    ("joined", "mxfp8", 16, 6144, 6144, 32): (16, 32, 256, 1, 4, 3),
    ("joined", "mxfp8", 16, 6144, 6144, 4096): (128, 64, 64, 1, 4, 3),
    ("matmul", "mxfp8", 1, 384, 6144, 1): (16, 64, 128, 1, 4, 4),
    ("matmul", "mxfp8", 1, 384, 6144, 32): (32, 64, 128, 1, 4, 4),
    ("matmul", "mxfp8", 1, 384, 6144, 64): (64, 64, 128, 1, 4, 3),
    ("matmul", "mxfp8", 1, 1024, 6144, 1): (16, 64, 64, 4, 4, 4),
    ("matmul", "mxfp8", 1, 1024, 6144, 32): (32, 64, 128, 4, 4, 4),
    ("matmul", "mxfp8", 1, 1024, 6144, 64): (64, 64, 64, 4, 4, 3),
    ("matmul", "mxfp8", 1, 1536, 6144, 1): (16, 64, 64, 4, 4, 4),
    ("matmul", "mxfp8", 1, 1536, 6144, 32): (32, 64, 64, 4, 4, 4),
    ("matmul", "mxfp8", 1, 1536, 6144, 64): (64, 64, 64, 4, 4, 3),
    ("matmul", "mxfp8", 1, 6144, 768, 1): (16, 64, 64, 16, 4, 4),
    ("matmul", "mxfp8", 1, 6144, 768, 32): (32, 64, 64, 16, 4, 4),
    ("matmul", "mxfp8", 1, 6144, 768, 64): (64, 64, 64, 16, 4, 3),
    ("matmul", "mxfp8", 1, 6144, 1536, 1): (16, 64, 64, 16, 4, 4),
    ("matmul", "mxfp8", 1, 6144, 1536, 32): (32, 64, 64, 16, 4, 4),
    ("matmul", "mxfp8", 1, 6144, 1536, 64): (64, 64, 64, 16, 4, 3),
    ("matmul", "mxfp8", 1, 6144, 3072, 1): (16, 64, 128, 8, 4, 4),
    ("matmul", "mxfp8", 1, 6144, 3072, 32): (32, 64, 128, 8, 4, 4),
    ("matmul", "mxfp8", 1, 6144, 3072, 64): (64, 64, 128, 8, 4, 3),
}
