"""Launch parameters by shape, written by scripts/tune.py: change it there.

Latest on NVIDIA H200, driver 580.159.04, jax 0.11.2, 2026-11-30 20:56 UTC; D 128,
pages of 128, topk 16, up to 32768 tokens of context. Keys are (query heads a group, size):
of tokens x groups, or for PAGE of tiles of 64 rows, a power of two.
"""

Table = dict[tuple[int, int], tuple[int, ...]]

# one token a request: (programs a token and group, keys a step, warps, stages)
ATTEND_DECODE: Table = {
    (8, 1): (16, 128, 4, 1),
    (8, 4): (16, 128, 4, 1),
    (8, 8): (16, 128, 4, 1),
    (8, 16): (16, 128, 4, 1),
    (8, 32): (8, 64, 4, 3),
    (8, 64): (4, 64, 4, 3),
    (8, 128): (2, 64, 4, 3),
    (8, 256): (1, 64, 4, 3),
    (16, 4): (16, 128, 4, 1),
    (16, 16): (8, 64, 4, 2),
    (16, 32): (4, 64, 4, 3),
    (16, 64): (3, 64, 4, 3),
    (16, 128): (2, 64, 4, 3),
    (16, 256): (1, 64, 4, 3),
    (16, 512): (1, 64, 4, 2),
    (16, 1024): (1, 64, 4, 2),
}

# the same over caches of 8 bits
ATTEND_DECODE_FP8: Table = {}

# few tokens of prompts, as above
ATTEND_FEW: Table = {}

# page by page: (tiles of 64 rows a program, warps)
PAGE: Table = {}
