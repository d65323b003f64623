"""`python -m minimax_jax` is the command `minimax-jax`."""

from __future__ import annotations

import sys

from minimax_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
