"""A call's contexts, hidden states and weights over eight devices are those of one."""

import numpy as np
import pytest
from parallel_models import one_device, over_ranks, prompts

LAYOUT = (2, 8, 4)  # two tensor ranks, four data ranks: five rows are two, two, one and none


@pytest.fixture(scope="module")
def pair():
    return one_device(), over_ranks(LAYOUT)


def test_contexts_and_states_equal_one_devices(pair):
    one, many = pair
    rows = prompts(20, 7, 33, 16, 12)
    width = max(map(len, rows))
    ids, mask = np.zeros((5, width + 4), int), np.zeros((5, width + 4), int)
    for r, row in enumerate(rows):
        ids[r, : len(row) + 4], mask[r, : len(row) + 4] = [*row, 1, 2, 3, 4], 1
    expected = one(ids, mask, output_hidden_states=True, output_router_logits=True, labels=ids)
    out = many(ids, mask, output_hidden_states=True, output_router_logits=True, labels=ids)
    for name in ("hidden_states", "router_logits"):
        for state, reference in zip(out[name], expected[name], strict=True):
            np.testing.assert_allclose(state, reference, rtol=0, atol=1e-4)
    np.testing.assert_allclose(out.loss, expected.loss, rtol=0, atol=1e-4)
    past = many(rows, use_cache=True).past_key_values
    turn = np.tile([[1, 2, 3, 4]], (5, 1))
    logits = np.asarray(many(turn, past_key_values=past).logits)
    for r, row in enumerate(rows):
        np.testing.assert_allclose(logits[r], expected.logits[r, len(row) : len(row) + 4], rtol=0, atol=1e-4)
    past.crop(-4)
    past.reorder_cache([4, 3, 2, 1, 0])  # rows move to other data ranks
    np.testing.assert_allclose(many(turn, past_key_values=past).logits, logits[::-1], rtol=0, atol=1e-4)


def test_weights_go_in_and_out(pair):
    one, many = pair
    state = one.state_dict()
    doubled = {name: np.asarray(array) * 2 for name, array in state.items()}
    many.load_state_dict(doubled)
    assert all(np.array_equal(array, doubled[name]) for name, array in many.state_dict().items())
    many.load_state_dict(state)
    with pytest.raises(ValueError, match="must not be given for a parallel model"):
        many.to("cpu")
