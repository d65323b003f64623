"""All of benchmarks/ and scripts/ imports, and finds the names that it imports, those inside of functions too."""

import ast
import importlib
import os
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"benchmarks", "minimax_jax", "minimax_kernels"}
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
MODULES = sorted((ROOT / "benchmarks").rglob("*.py"))


def missing(source: str) -> list[str]:
    """The names of this repository's packages that a source imports and that are not there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        ours = [(module, name) for module, name in names if module.split(".")[0] in OURS]
        found += [f"{module}.{name}" if name else module for module, name in ours if lacks(module, name)]
    return found


def lacks(module: str, name: str | None) -> bool:
    """Whether a module, or a name in it, is missing."""
    try:
        loaded = importlib.import_module(module)
        if name is not None and not hasattr(loaded, name):
            importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in OURS:
            raise  # another package: torch, say
        return True
    return False


def needs_torch(source: str) -> bool:
    return "import torch" in source or "torch_bridge" in source


@pytest.mark.parametrize("file", [*MODULES, *SCRIPTS], ids=lambda file: str(file.relative_to(ROOT)))
def test_imports(file, monkeypatch):
    source = file.read_text(encoding="utf-8")
    if needs_torch(source):
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    assert missing(source) == []
    if file in SCRIPTS:  # as `python scripts/NAME.py` finds what lies beside it, without running main
        monkeypatch.setattr(sys, "path", [str(file.parent), *sys.path])
        monkeypatch.setattr(os, "environ", dict(os.environ))  # what a script sets there stays there
        runpy.run_path(str(file), run_name="imported")
    elif file.name != "__main__.py":
        importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))


def test_a_name_that_is_gone_is_noticed():
    source = "def run():\n    from benchmarks.machine import describe_machine, gone\n    import benchmarks.nowhere\n"
    assert missing(source) == ["benchmarks.machine.gone", "benchmarks.nowhere"]
