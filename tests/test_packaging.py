"""The package as a whole: what it declares, what it imports, and which way its parts depend on each other."""

import ast
import importlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import minimax_jax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = {"minimax_jax": ROOT / "minimax_jax", "minimax_kernels": ROOT / "kernels" / "minimax_kernels"}

# Part -> parts that it must not import; its own modules are always allowed.
FORBIDDEN = {
    "minimax_kernels": ["minimax_jax"],
    "minimax_jax.segmented": ["minimax_jax", "minimax_kernels"],
    "minimax_jax.model": [
        f"minimax_jax.{part}" for part in ("cache", "attention", "engine", "checkpoint", "segmented")
    ],
    "minimax_jax.attention": ["minimax_jax.engine"],
    "minimax_jax.cache": ["minimax_jax.engine", "minimax_jax.attention", "minimax_jax.model"],
    "minimax_jax.parallel": ["minimax_jax.engine", "minimax_jax.attention"],
    "minimax_jax.checkpoint": ["minimax_jax.engine", "minimax_jax.attention", "minimax_jax.cache"],
    "minimax_jax.engine": ["minimax_jax.cli"],
}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of both packages."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def imports(name: str, path: Path) -> set[str]:
    """Dotted names that a module imports anywhere in it; `from a import b` gives a and a.b."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            found.update([module, *(f"{module}.{alias.name}" for alias in node.names)])
    return found


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def loaded_after(statement: str) -> set[str]:
    """Top-level names in sys.modules after a statement in a fresh interpreter."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_version_is_the_declared_one():
    assert minimax_jax.__version__ == PROJECT["version"] == importlib.metadata.version("minimax-jax")


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]])
def test_declared_dependency_is_installed_within_its_bounds(line: str):
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate():
        pytest.skip("not for this Python")
    assert requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    if line in PROJECT["dependencies"]:
        importlib.import_module(requirement.name)


def test_every_import_is_declared():
    declared = {Requirement(line).name for line in PROJECT["dependencies"]} | {"jaxlib", *PACKAGES}
    # the test below sees that nobody loads them without being asked to
    optional = {"torch", "transformers", "matplotlib"}
    undeclared = [
        f"{name}: {found}"
        for name, path in modules()
        for found in imports(name, path)
        if (top := found.partition(".")[0]) not in declared | optional and top not in sys.stdlib_module_names
    ]
    assert not undeclared


@pytest.mark.parametrize(
    "statement", ["import minimax_jax, minimax_jax.cli", "from minimax_jax import MiniMaxM3ForCausalLM"]
)
def test_import_needs_neither_torch_nor_transformers(statement: str):
    assert not loaded_after(statement) & {"torch", "transformers", "matplotlib"}


def test_only_the_bridge_and_the_model_that_users_hold_know_torch():
    torch_modules = {
        name
        for name, path in modules()
        if any(is_inside(found, top) for found in imports(name, path) for top in ("torch", "minimax_jax.torch"))
    }
    assert {name for name in torch_modules if not is_inside(name, "minimax_jax.torch")} == {"minimax_jax.causal_lm"}


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_the_bridge_loads_torch_alone():
    assert loaded_after("import minimax_jax.torch") & {"torch", "transformers"} == {"torch"}


def test_the_bridge_says_what_it_needs():
    code = "import sys; sys.modules['torch'] = None; import minimax_jax.torch"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError: minimax_jax.torch needs torch: pip install 'minimax-jax[torch]'" in run.stderr


def test_kernels_import_alone():
    loaded = loaded_after("import minimax_kernels")
    assert "minimax_kernels" in loaded
    assert "minimax_jax" not in loaded


@pytest.mark.parametrize("part", FORBIDDEN)
def test_import_direction(part: str):
    wrong = [
        f"{name} imports {found}"
        for name, path in modules()
        if is_inside(name, part)
        for found in imports(name, path)
        if any(is_inside(found, other) for other in FORBIDDEN[part]) and not is_inside(found, part)
    ]
    assert not wrong


def test_imports_of_relative_and_nested_forms_are_seen(tmp_path: Path):
    path = tmp_path / "pages.py"
    path.write_text("def f():\n    from ..engine import llm\n    from . import sizes\n    import a.b\n")
    found = imports("minimax_jax.cache.pages", path)
    names = "minimax_jax.engine minimax_jax.engine.llm minimax_jax.cache minimax_jax.cache.sizes a.b"
    assert found == set(names.split())


def test_files_stay_readable():
    folders = ("minimax_jax", "kernels", "tests", "scripts")
    files = [path for folder in folders for kind in ("*.py", "*.sh") for path in (ROOT / folder).rglob(kind)]
    too_long = {str(path): lines for path in files if (lines := len(path.read_text().splitlines())) > 500}
    assert files
    assert not too_long


def test_wheel_holds_both_packages_and_the_embedded_checkpoint(tmp_path: Path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip_wheel = [sys.executable, *"-m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir".split()]
    subprocess.run([*pip_wheel, tmp_path, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == PACKAGES.keys()
    for package, folder in PACKAGES.items():
        files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {f"{package}/{path.relative_to(folder).as_posix()}" for path in files} <= names
