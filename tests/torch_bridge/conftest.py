"""Lets these tests build pairs of models as the parity tests do, and keeps torch from fighting for cores."""

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "model"))


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """Its threads wait in busy loops: beside JAX's, and those of another worker, a test took seven times as long."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
