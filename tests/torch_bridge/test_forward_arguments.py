"""A call with transformers' arguments gives what transformers gives: loss, hidden states, router logits, contexts."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch_pairs import pair_config, torch_model, weights_of  # noqa: E402

from minimax_jax import MiniMaxM3ForCausalLM  # noqa: E402
from minimax_jax.cache import PastKeyValues  # noqa: E402
from minimax_jax.outputs import CausalLMOutput  # noqa: E402

TOLERANCE = 2e-4
CONFIG = pair_config(layers=2, max_position_embeddings=256)
LENGTH = 90


@pytest.fixture(scope="module")
def pair():
    """(transformers' model, ours with the same weights)."""
    theirs = torch_model(CONFIG)
    return theirs, MiniMaxM3ForCausalLM(CONFIG, weights_of(theirs, CONFIG))


@pytest.fixture(scope="module")
def inputs():
    """Two rows, the second padded on the right, and labels of which some do not count."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 96, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 61:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 30:40] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def sized(ours):
    """A context of two rows whose pages all tests share the executables of."""
    return ours.empty_past_key_values(2, max_cache_len=LENGTH)


def close(ours, theirs, mask):
    live = mask.bool()
    torch.testing.assert_close(ours[live], theirs[live], atol=TOLERANCE, rtol=0)
    assert (ours[~live] == 0).all()


def test_loss_hidden_states_and_router_logits_are_transformers(pair, inputs):
    theirs, ours = pair
    mask = inputs["attention_mask"]
    with torch.no_grad():
        expected = theirs(**inputs, output_hidden_states=True, output_router_logits=True)
    out = ours(**inputs, output_hidden_states=True, output_router_logits=True)
    close(out.logits, expected.logits, mask)
    assert len(out.hidden_states) == len(expected.hidden_states) == CONFIG.num_hidden_layers + 1
    for state, reference in zip(out.hidden_states, expected.hidden_states, strict=True):
        close(state, reference, mask)
    assert len(out.router_logits) == len(expected.router_logits) == 1
    for logits, reference in zip(out.router_logits, expected.router_logits, strict=True):
        close(logits, reference, mask.reshape(-1))
    for name in ("loss", "aux_loss"):
        assert abs(float(out[name]) - float(expected[name])) <= TOLERANCE
    with torch.no_grad():
        plain = theirs(**inputs).loss
    assert abs(float(ours(**inputs).loss) - float(plain)) <= TOLERANCE
    assert abs(float(out.loss) - float(plain)) > 1e-4  # the auxiliary loss is in it


def test_padding_counts_in_no_loss(pair, inputs):
    _, ours = pair
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = ours(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert torch.equal(ours(ids, mask, labels=ids).loss, expected)
    left = [tensor.clone() for tensor in (ids, mask)]
    for tensor in left:
        tensor[1] = tensor[1].roll(LENGTH - 61)
    torch.testing.assert_close(ours(*left, labels=left[0]).loss, expected)


def test_turns_equal_one_pass_and_transformers(pair, inputs):
    theirs, ours = pair
    ids = inputs["input_ids"]
    whole = ours(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(whole, theirs(ids).logits, atol=TOLERANCE, rtol=0)
    past, parts, at = None, [], 0
    for turn in (40, 1, 1, 24, 24):  # over the edges of blocks of 16 tokens; the pool grows on the way
        name = "cache" if at % 2 else "past_key_values"  # transformers' newer name, and the one that it had before
        out = ours(ids[:, at : at + turn], **{name: past}, use_cache=True)
        past, at = out[name], at + turn
        assert past.get_seq_length() == at
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_turns_are_what_each_row_gives_alone(pair, side):
    _, ours = pair
    generator = np.random.default_rng(1)
    rows = [[generator.integers(1, 96, n) for n in lengths] for lengths in ((50, 1, 34), (40, 1, 0))]
    alone = np.asarray(ours([np.concatenate(row) for row in rows]).logits)
    past, seen = sized(ours), []
    for turn in range(3):
        width = max(len(row[turn]) for row in rows)
        ids, mask = np.full((2, width), 95), np.zeros((2, width), int)
        for r, row in enumerate(rows):
            place = slice(width - len(row[turn]), width) if side == "left" else slice(0, len(row[turn]))
            ids[r, place], mask[r, place] = row[turn], 1
        seen.append(mask)
        given = mask if turn == 1 else np.concatenate(seen, axis=1)  # the new columns alone, or all, as transformers
        out = ours(ids, given, past_key_values=past)
        for r, row in enumerate(rows):
            before = sum(map(len, row[:turn]))
            expected = alone[r, before : before + len(row[turn])]
            np.testing.assert_allclose(np.asarray(out.logits)[r][mask[r] == 1], expected, atol=2e-5)
    assert past.kv_lens.tolist() == [85, 41]


def test_contexts_are_cropped_reordered_and_repeated(pair, inputs):
    _, ours = pair
    ids = inputs["input_ids"][:, :41]
    full = ours(ids).logits[:, -1]

    def last(past, rows):
        return ours(ids[rows, -1:], past_key_values=past).logits[:, 0]

    past = sized(ours)
    ours(ids, past_key_values=past)
    past.crop(-1)
    torch.testing.assert_close(last(past, [0, 1]), full, atol=2e-5, rtol=0)
    past.crop(-1)
    past.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(last(past, [1, 0]), full[[1, 0]], atol=2e-5, rtol=0)
    past.crop(-1)
    past.batch_repeat_interleave(2)
    assert past.batch_size == 4
    torch.testing.assert_close(last(past, [1, 1, 0, 0]), full[[1, 1, 0, 0]], atol=2e-5, rtol=0)
    past.crop(-1)
    past.batch_select_indices([3, 0])
    torch.testing.assert_close(last(past, [0, 1]), full, atol=2e-5, rtol=0)
    past.reset()
    assert (past.get_seq_length(), past.kv_lens.tolist()) == (0, [0, 0])


def test_a_sized_context_keeps_its_pages(pair, inputs):
    _, ours = pair
    past, ids = sized(ours), inputs["input_ids"]
    pages = past.pool.num_pages
    logits = ours(ids[:, :41], past_key_values=past).logits
    assert past.pool.num_pages == pages
    torch.testing.assert_close(logits, ours(ids[:, :41]).logits, atol=2e-5, rtol=0)
    past.reserve(past.kv_lens + 49)
    assert past.pool.num_pages == pages


def test_logits_to_keep(pair, inputs):
    _, ours = pair
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = ours(ids, mask).logits
    for keep, columns in (
        (3, slice(-3, None)),
        (LENGTH + 5, slice(None)),
        (torch.tensor([5, 2, 88, 2]), [5, 2, 88, 2]),
    ):
        torch.testing.assert_close(ours(ids, mask, logits_to_keep=keep).logits, whole[:, columns], atol=2e-5, rtol=0)


def test_position_ids_turn_the_embedding(pair, inputs):
    theirs, ours = pair
    ids = inputs["input_ids"]
    whole = ours(ids).logits
    for positions in (torch.arange(LENGTH), torch.arange(LENGTH)[None], torch.arange(LENGTH).expand(2, -1)):
        assert torch.equal(ours(ids, position_ids=positions).logits, whole)
    shifted = ours(ids, position_ids=torch.arange(LENGTH) + 100).logits
    torch.testing.assert_close(shifted, whole, atol=1e-3, rtol=0)  # only distances matter
    stretched = torch.arange(LENGTH) * 2
    dense = pair_config(layers=1, dense=1, max_position_embeddings=256)
    theirs = torch_model(dense)
    with torch.no_grad():
        expected = theirs(ids, position_ids=stretched[None], attention_mask=torch.ones_like(ids)).logits
    result = MiniMaxM3ForCausalLM(dense, weights_of(theirs, dense))(ids, position_ids=stretched).logits
    torch.testing.assert_close(result, expected, atol=TOLERANCE, rtol=0)


def test_results_by_name_key_and_place(pair, inputs):
    _, ours = pair
    start = {name: tensor[:, :40] for name, tensor in inputs.items()}
    out = ours(**start, use_cache=True)
    assert isinstance(out, CausalLMOutput) and list(out) == ["loss", "logits", "past_key_values"]
    assert out[0] is out.loss is out["loss"] and out[1:] == (out.logits, out.past_key_values) and len(out) == 3
    assert out.cache is out["cache"] is out.past_key_values and "cache" in out
    assert "hidden_states" not in out and out.hidden_states is None and out.aux_loss is None
    with pytest.raises(KeyError, match="'attentions': must be one of 'loss', 'logits'"):
        out["attentions"]
    without = ours(**inputs)
    assert without.past_key_values is without.cache is None and "cache" not in without
    values = ours.forward(**inputs, return_dict=False)
    assert isinstance(values, tuple) and len(values) == 2


def test_torch_in_gives_torch_out_and_arrays_give_arrays(pair, inputs, monkeypatch):
    import minimax_jax.torch.tensors as tensors

    _, ours = pair
    crossed = []
    to_torch = tensors.to_torch
    monkeypatch.setattr(
        tensors, "to_torch", lambda array: (crossed.append((array, to_torch(array))), crossed[-1][1])[1]
    )
    out = ours(**inputs, output_hidden_states=True, output_router_logits=True)
    values = (out.loss, out.aux_loss, out.logits, *out.hidden_states, *out.router_logits)
    assert all(isinstance(value, torch.Tensor) for value in values)
    assert len(crossed) == len(values)
    for array, tensor in crossed:
        assert tensor.data_ptr() == array.unsafe_buffer_pointer()  # no copy
    expected = out.logits.numpy()
    for kind in (np.asarray, jax.numpy.asarray):
        logits = ours(**{name: kind(tensor.numpy()) for name, tensor in inputs.items()}).logits
        assert isinstance(logits, jax.Array)
        np.testing.assert_array_equal(np.asarray(logits), expected)
    narrow = ours(inputs["input_ids"].to(torch.int32), inputs["attention_mask"].bool())
    np.testing.assert_array_equal(narrow.logits.numpy(), expected)


def test_writing_to_results_changes_nothing_else(pair, inputs):
    _, ours = pair
    given = {**inputs, "output_hidden_states": True, "output_router_logits": True}
    out = ours(**given)
    before = out.logits.clone()
    for tensor in (out.logits, *out.hidden_states, *out.router_logits):
        tensor.zero_()
    assert torch.equal(ours(**given).logits, before)


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_inputs_may_be_written_over_after_a_call(pair, kind):
    """Nothing that a call was given is read once it has returned."""
    _, ours = pair
    ids, mask = kind([[1, 2, 3, 4]] * 2), kind([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels, positions = kind([[1, 2, 3, 4]] * 2), kind([[0, 1, 2, 3]] * 2)
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}
    expected = [np.asarray(value) for value in ours(**given, return_dict=False)]
    out = ours(**given)
    for array in given.values():
        array[:] = 0
    for value, reference in zip((out.loss, out.logits), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(value), reference)


IDS = [[1, 2, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [[1, 2]]}, r"labels has shape \(1, 2\): must be \(1, 3\), as input_ids"),
        ({"labels": [[1, 2, 96]]}, "labels holds 96: must be within 0..95, or -100"),
        ({"labels": [[1.0, 2.0, 3.0]]}, "labels is float64: must be integers"),
        ({"labels": IDS, "logits_to_keep": 1}, "labels and logits_to_keep"),
        ({"logits_to_keep": -1}, "logits_to_keep = -1: must be an integer >= 0"),
        ({"logits_to_keep": [3]}, r"logits_to_keep = \[3\]: must be columns within -3..2"),
        ({"logits_to_keep": 1.5}, "logits_to_keep = 1.5"),
        ({"position_ids": [[0, 1]]}, r"position_ids has shape \(1, 2\): must be \(1, 3\)"),
        ({"position_ids": [[0, 1, 256]]}, "position_ids holds 256: must be within 0..255"),
        ({"position_ids": [[0.0, 1.0, 2.0]]}, "position_ids is float64: must be integers"),
        ({"past_key_values": {}}, "past_key_values is dict: must come from an earlier call"),
        ({"past_key_values": {}, "attention_mask": [[1, 1, 1]]}, "past_key_values is dict"),
        ({"labels": IDS, "logits_to_keep": [2, 1, 0]}, "labels and logits_to_keep"),
        ({"input_ids": [[]]}, r"input_ids\[0\] is empty"),
    ],
)
def test_arguments_that_do_not_fit_are_named(pair, arguments, message):
    with pytest.raises(ValueError, match=message):
        pair[1](**{"input_ids": IDS, **arguments})


def test_contexts_that_do_not_fit_are_named_and_unharmed(pair):
    _, ours = pair
    past = ours(IDS, use_cache=True).past_key_values
    other = PastKeyValues(CONFIG.replace(rope_theta=1e4), 1, "float32")
    for arguments, message in (
        ({"input_ids": [[1], [2]], "past_key_values": past}, "input_ids has 2 rows: must be 1, as past_key_values"),
        ({"input_ids": [[1]], "past_key_values": other}, "past_key_values is of another model"),
        ({"input_ids": [[1]], "past_key_values": past, "cache": past}, "cache and past_key_values: give one of them"),
        ({"input_ids": [[1]], "past_key_values": past, "use_cache": False}, "use_cache = False"),
        ({"input_ids": [[1] * 254], "past_key_values": past}, "input_ids ends at 257 tokens .* = 256 fit"),
        ({"input_ids": [[1]], "attention_mask": [[0, 1, 1, 1]], "past_key_values": past}, "differs in its first 3"),
        ({"input_ids": [[1]], "attention_mask": [[0]], "past_key_values": past}, "at least one row needs a token"),
        (
            {"input_ids": [[1]], "attention_mask": [[1, 1]], "past_key_values": past},
            r"attention_mask has shape \(1, 2\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ours(**arguments)
    for call, message in (
        (lambda: past.crop(1), r"tokens_to_remove = 1: must be within -3..0"),
        (lambda: past.crop(-4), r"tokens_to_remove = -4: must be within -3..0"),
        (lambda: past.batch_select_indices([1]), r"indices = \[1\]: must be row numbers within 0..0"),
        (lambda: past.batch_select_indices([]), r"indices = \[\]: must be row numbers"),
        (lambda: past.batch_repeat_interleave(0), "repeats = 0: must be at least 1"),
        (lambda: ours.empty_past_key_values(0), "batch_size = 0: must be at least 1"),
        (lambda: ours.empty_past_key_values(1, max_cache_len=-1), "max_cache_len = -1: must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert past.kept.tolist() == [[True] * 3]
