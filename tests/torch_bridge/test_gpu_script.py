"""The parts of scripts/check_torch_gpu.py, at toy sizes on the CPU."""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from benchmarks.torch_bridge import memory_checks, transformers_checks  # noqa: E402

CPU = torch.device("cpu")


def test_addresses_and_streams():
    assert memory_checks.addresses(CPU, small=True)["ok"]
    found = memory_checks.streams(CPU, small=True)
    assert found["ok"] and found["wrong"].keys() >= {"read too early", "read after a later write"}


def test_logits_of_every_implementation():
    found = transformers_checks.logits(CPU, small=True)
    assert found["ok"] and found["errors"].keys() == set(transformers_checks.IMPLEMENTATIONS)


def test_tokens_are_transformers_own_and_part_when_a_layer_is_off(monkeypatch):
    """At a parting float32 decides: what no implementation's error explains is no tie."""
    found = transformers_checks.tokens(CPU, small=True, prompts=1)
    assert found["ok"] and found["prompts"] == [{"eager": {"same": 12}, "minimax_jax": {"same": 12}}]
    own, hooks = transformers_checks.with_attention, []

    def spoiled(model, implementation):
        while hooks:
            hooks.pop().remove()
        if implementation == "minimax_jax":
            layer = model.model.layers[1].self_attn
            hooks.append(layer.register_forward_hook(lambda module, args, out: (0.5 * out[0], *out[1:])))
        return own(model, implementation)

    monkeypatch.setattr(transformers_checks, "with_attention", spoiled)
    found = transformers_checks.tokens(CPU, small=True, prompts=1)
    row = found["prompts"][0]["minimax_jax"]
    assert not found["ok"] and row["same"] < 12 and not row["tie"]
    assert row["errors"]["minimax_jax"] > 100 * row["errors"]["sdpa"]


def test_a_wrong_result_is_no_pass(monkeypatch):
    """The checks can fail: a kernel that is off by a little is found."""
    msa = memory_checks.msa
    calls = iter(range(10**6))
    monkeypatch.setattr(memory_checks, "msa", lambda *args, **kwargs: msa(*args, **kwargs) + 1e-3 * (next(calls) == 8))
    found = memory_checks.streams(CPU, small=True)
    assert not found["ok"] and sum(found["wrong"].values()) == 2  # of one call, read early and late
