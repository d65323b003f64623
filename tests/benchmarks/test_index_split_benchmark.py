"""The benchmark of shared-out index keys runs on simulated devices, and both ways select the same blocks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_a_try_on_cpu_devices(tmp_path):
    command = [sys.executable, "-m", "benchmarks.index_split", "--tiny", "--tensor", "4", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment.pop("XLA_FLAGS", None)  # the command makes its own devices
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = json.loads((tmp_path / "index_split.json").read_text())["rows"]
    assert [row["new"] for row in rows] == [1, 40] and all(row["different_rows"] == 0 for row in rows)
    assert all(row["all_keys_us"] > 0 and row["shared_out_us"] > 0 for row in rows)
