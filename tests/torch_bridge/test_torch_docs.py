"""docs/torch.md says of each method and argument of transformers' class what becomes of it here, and says so truly."""

import inspect
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from minimax_jax.torch import MiniMaxM3ForCausalLM  # noqa: E402

TEXT = (Path(__file__).parents[2] / "docs" / "torch.md").read_text(encoding="utf-8")
TABLES = TEXT[TEXT.index("## The class, method by method") :]
THEIRS = transformers.MiniMaxM3VLForCausalLM
OURS = MiniMaxM3ForCausalLM
OF_THIS_VERSION = pytest.mark.skipif(
    f"transformers {transformers.__version__}" not in TABLES, reason="tables are of another version"
)


def names_in(text):
    return {name for quoted in re.findall(r"`([^`]+)`", text) for name in re.findall(r"[A-Za-z_]\w*", quoted)}


def rows(start):
    return [line.split("|")[1:-1] for line in TABLES.splitlines() if line.startswith("| ") and start in line]


@OF_THIS_VERSION
def test_every_method_and_argument_has_its_place():
    public = {name for name in dir(THEIRS) if not name.startswith("_")}
    unplaced = public - names_in(TABLES)
    assert not unplaced
    for method in ("from_pretrained", "forward", "generate", "save_pretrained"):
        parameters = set(inspect.signature(getattr(THEIRS, method)).parameters)
        ((_, *columns),) = rows(f"| `{method}` |")
        assert not parameters - names_in("|".join(columns)) - {"self", "cls", "args", "kwargs", "model_args"}, method


@OF_THIS_VERSION
@pytest.mark.parametrize("kind", ["same", "different"])
def test_arguments_of_methods_that_are_there_are_served_or_listed(kind):
    for row in (row for row in rows(f"| {kind}") if len(row) == 2):
        listed = names_in("|".join(row))
        for name in (name for name in listed if hasattr(OURS, name) and callable(getattr(THEIRS, name, None))):
            theirs, ours = (inspect.signature(getattr(model, name)).parameters for model in (THEIRS, OURS))
            assert not set(theirs) - set(ours) - listed - {"args", "kwargs"}, name


def test_what_is_called_the_same_is_there():
    ((_, names),) = (row for row in rows("| same |") if len(row) == 2)
    assert len(names_in(names)) > 10
    missing = [name for name in names_in(names) - {"minimax_jax", "torch"} if not hasattr(OURS, name)]
    assert not missing
    for method in ("from_pretrained", "forward", "generate"):
        ((_, same, *_),) = rows(f"| `{method}` |")
        signature = set(inspect.signature(OURS.__call__ if method == "forward" else getattr(OURS, method)).parameters)
        served = names_in(same) - {"kwargs"}
        if method == "generate":
            signature |= {"max_length", "pad_token_id"}  # by **options; tests of generate use them
        assert served and not served - signature


def test_what_is_called_absent_is_not_there():
    absent = [names for kind, names in (row for row in rows("absent:") if len(row) == 2) if kind.startswith(" absent")]
    assert len(absent) >= 9
    found = [name for names in absent for name in names_in(names) if hasattr(OURS, name)]
    assert not found
