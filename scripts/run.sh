#!/usr/bin/env bash
# Generates text: bash scripts/run.sh --prompt "..."
#
# The first run makes .venv (Python 3.11 to 3.13) and installs the package, for CUDA when an NVIDIA driver is there;
# later runs start at once. All arguments go to `minimax-jax generate`; --help lists them.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment
exec "$venv/bin/minimax-jax" generate "$@"
