"""`execution` of generate and of the command line."""

import json

import numpy as np
import pytest
from small_models import random_prompt, small_model

from minimax_jax import cli
from minimax_jax.engine.execution import prefill_execution


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_every_execution_gives_the_same_tokens(model):
    options = {"do_sample": True, "temperature": 1.3, "top_k": 7, "seed": 5}
    prompts = [random_prompt(n, seed=n) for n in (21, 40, 5)]
    results = {
        execution: np.asarray(model.generate(prompts, max_new_tokens=6, execution=execution, **options)).tolist()
        for execution in ("auto", "whole", "segmented", "eager")
    }
    assert all(result == results["whole"] for result in results.values())


def test_the_tiny_checkpoint_says_the_same_on_the_command_line(capsys):
    arguments = ["generate", "--prompt", "In the beginning", "--max-new-tokens", "3", "--temperature", "0", "--json"]
    tokens = []
    for execution in ("segmented", "whole"):
        assert cli.main([*arguments, "--execution", execution]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["token_ids"])
    assert tokens[0] == tokens[1] and len(tokens[0]) == 3


def test_unknown_executions_are_named(model, capsys):
    with pytest.raises(ValueError, match="execution = 'fast': must be one of 'auto', 'segmented', 'whole', 'eager'"):
        model.generate([[1, 2]], execution="fast")
    assert cli.main(["generate", "--execution", "fast"]) == 2
    assert "invalid choice: 'fast'" in capsys.readouterr().err


def test_auto_segments_large_steps_of_accelerators_and_deep_models_of_cpus():
    assert prefill_execution("auto", 2048, 2, "gpu") == "segmented"
    assert prefill_execution("auto", 2047, 60, "gpu") == "whole"
    assert prefill_execution("auto", 8192, 11, "cpu") == "whole"
    assert prefill_execution("auto", 1, 12, "cpu") == "segmented"
    assert prefill_execution("segmented", 1, 2, "cpu") == "segmented"
