#!/usr/bin/env bash
# Runs the tests: bash scripts/test.sh            ruff, mypy, then the whole suite on all cores
#                 bash scripts/test.sh -k pages   pytest with these arguments
#
# The first run makes .venv and installs the `test` extra. To test with another Python than the first one found, make
# .venv with it beforehand: rm -rf .venv && python3.12 -m venv .venv
# On Python 3.11 torch is installed and its tests never skip. On 3.12 and 3.13 they skip until torch is there:
# .venv/bin/python -m pip install -e ".[test,torch]"

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment test
cd "$root"
if [ $# -eq 0 ]; then
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    "$python" -m mypy
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    [ -z "$(cuda_extra)" ] || cores=1 # one process at a time on a GPU
    set -- --durations=10
    [ "$cores" -eq 1 ] || set -- -n "$((cores < 8 ? cores : 8))" --dist worksteal "$@"
fi
exec "$python" -m pytest "$@"
