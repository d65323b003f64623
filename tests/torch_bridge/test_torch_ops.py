"""The operations on torch tensors: results, out=, what torch.library and torch.compile ask of them."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from small_batch import OPERATIONS, SCALE, TOPK, WITH_OUT, arrays, batch_of, tensors  # noqa: E402

import minimax_jax.torch as bridge  # noqa: E402
import minimax_kernels  # noqa: E402


def run(name, given, **more):
    operands, options = OPERATIONS[name]
    return getattr(bridge, name)(*(given[operand] for operand in operands), batch_of(given), **options, **more)


def raw_operands(name, given):
    batch = [given[field] for field in ("block_tables", "query_starts", "kv_lens")]
    return (*(given[operand] for operand in OPERATIONS[name][0]), *batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_results_are_those_of_the_kernels(name, dtype):
    given = tensors(dtype)
    operands, options = OPERATIONS[name]
    same = arrays(given)
    operation = jax.jit(getattr(minimax_kernels, name), static_argnames=tuple(options))
    expected = operation(*(same[operand] for operand in operands), batch_of(same), **options)
    result = run(name, given)
    assert str(result.dtype).removeprefix("torch.") == expected.dtype.name
    np.testing.assert_array_equal(result.float().numpy(), np.asarray(expected, np.float32))


@pytest.mark.parametrize("name", OPERATIONS)
def test_strided_and_int64_operands_give_the_same(name):
    given = tensors()
    expected = run(name, given)
    for operand in ("q", "idx_q", "scores"):
        given[operand] = given[operand].transpose(0, 1).contiguous().transpose(0, 1)
        assert not given[operand].is_contiguous()
    for field in ("block_tables", "query_starts", "kv_lens", "selected"):
        given[field] = given[field].to(torch.int64)
    assert torch.equal(run(name, given), expected)


@pytest.mark.parametrize("name", WITH_OUT)
def test_out_takes_the_result_and_keeps_rows_without_a_token(name):
    given = tensors()
    expected = run(name, given)
    live = int(given["query_starts"][-1])
    for out in (torch.full_like(given["q"], 7.0), torch.full((4, 9, 32), 7.0).transpose(0, 1)):
        address = out.data_ptr()
        assert run(name, given, out=out) is out and out.data_ptr() == address
        assert torch.equal(out[:live], expected[:live])
        assert (out[live:] == 7).all() and (expected[live:] == 0).all()
    narrow = run(name, given, out=torch.zeros(given["q"].shape, dtype=torch.bfloat16))
    torch.testing.assert_close(narrow[:live].float(), expected[:live], atol=1e-2, rtol=1e-2)
    in_place = run(name, given, out=given["q"])
    assert torch.equal(in_place[:live], expected[:live])


@pytest.mark.parametrize("name", ["index_score", "select_blocks"])
def test_out_takes_scores_and_selections(name):
    given = tensors()
    expected = run(name, given)
    for dtype in (expected.dtype, torch.int64 if expected.dtype == torch.int32 else torch.bfloat16):
        out = torch.zeros(expected.shape[::-1], dtype=dtype).permute(2, 1, 0)
        assert run(name, given, out=out) is out
        torch.testing.assert_close(out, expected.to(dtype))
    with pytest.raises(ValueError, match=r"out has shape \(1, 2\): must be \(2, 9, "):
        run(name, given, out=torch.zeros(1, 2, dtype=expected.dtype))
    with pytest.raises(ValueError, match="out is bool: must be one of"):
        run(name, given, out=torch.zeros(expected.shape, dtype=torch.bool))


@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(name):
    """Schema (what is mutated), fake implementation, autograd registration, tracing with dynamic shapes."""
    given, options = tensors(), OPERATIONS[name][1]
    torch.library.opcheck(getattr(torch.ops.minimax_jax, name), raw_operands(name, given), options)
    out = torch.zeros_like(run(name, given))
    operator = getattr(torch.ops.minimax_jax, f"{name}_out")
    torch.library.opcheck(operator, (*raw_operands(name, given), out), options)


class Layer(torch.nn.Module):
    """Writes new keys and attends, between ordinary torch operations."""

    def forward(self, given, k, v, idx_k, slots):
        bridge.write_kv(given["k_cache"], given["v_cache"], k, v, slots)
        bridge.write_index(given["index_cache"], idx_k, slots)
        caches = given["k_cache"], given["v_cache"], given["idx_q"], given["index_cache"]
        return torch.relu(bridge.msa(given["q"] * 2, *caches, batch_of(given), scale=SCALE, topk=TOPK)) + 1


def new_tokens():
    generator = torch.Generator().manual_seed(3)
    k, v = torch.randn((2, 9, 2, 32), generator=generator)
    slots = torch.tensor([0, 5, -1, 96, 17, 33, -1, 95, 47])  # two to skip, and one past the last page
    return k, v, torch.randn((9, 1, 16), generator=generator), slots


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_has_no_graph_break(backend):
    torch._dynamo.reset()
    expected_of, given = tensors(), tensors()
    expected = Layer()(expected_of, *new_tokens())
    result = torch.compile(Layer(), fullgraph=True, backend=backend)(given, *new_tokens())
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-6)
    for name in ("k_cache", "v_cache", "index_cache"):
        assert torch.equal(given[name], expected_of[name])
        assert not torch.equal(given[name], tensors()[name])


CACHES = ("k_cache", "v_cache", "index_cache")


def with_fp8_caches():
    """The tensors with caches of 8 bits."""
    given = tensors(torch.bfloat16)
    return given | {name: given[name].to(torch.float8_e4m3fn) for name in CACHES}


def test_fp8_caches_give_what_their_numbers_give():
    given = with_fp8_caches()
    wide = given | {name: given[name].bfloat16() for name in CACHES}
    for name in ("index_score", "msa"):
        assert torch.equal(run(name, given), run(name, wide))
    with pytest.raises(ValueError, match="q is float8_e4m3fn: must be one of float32, bfloat16, float16"):
        run("msa", given | {"q": given["q"].to(torch.float8_e4m3fn)})


@pytest.mark.parametrize("fp8", [False, True])
def test_cache_writes_are_in_place_and_those_of_the_kernels(fp8):
    given, (k, v, idx_k, slots) = with_fp8_caches() if fp8 else tensors(), new_tokens()
    v[:3, 0, :3] = torch.tensor([470.0, -torch.inf, torch.nan])  # what e4m3 has no numbers for
    same = arrays(given)
    new = [jax.numpy.array(tensor.numpy()) for tensor in (k, v, slots.int())]
    k_cache, v_cache = minimax_kernels.write_kv(same["k_cache"], same["v_cache"], *new)
    index_cache = minimax_kernels.write_index(same["index_cache"], jax.numpy.array(idx_k.numpy()), new[2])
    addresses = {name: given[name].data_ptr() for name in CACHES}
    assert bridge.write_kv(given["k_cache"], given["v_cache"], k, v, slots)[0] is given["k_cache"]
    assert bridge.write_index(given["index_cache"], idx_k, slots) is given["index_cache"]
    for name, expected in (("k_cache", k_cache), ("v_cache", v_cache), ("index_cache", index_cache)):
        assert given[name].data_ptr() == addresses[name]
        np.testing.assert_array_equal(given[name].float().numpy(), np.asarray(expected, np.float32))


@pytest.mark.parametrize("slots", [[-1] * 9, [96, -5, 200, -1, -1, -1, -1, -1, 10**6], list(range(9))])
def test_slots_outside_the_pages_write_nothing(slots):
    given, (k, v, *_) = tensors(), new_tokens()
    bridge.write_kv(given["k_cache"], given["v_cache"], k, v, torch.tensor(slots))
    expected = tensors()["k_cache"]
    for row, slot in enumerate(slots):
        if 0 <= slot < 96:
            expected[slot // 16, :, slot % 16] = k[row]
    assert torch.equal(given["k_cache"], expected)


def test_the_next_call_sees_what_torch_wrote_to_a_cache():
    """Nothing of a cache stays in JAX from one call to the next."""
    given = tensors()
    before = run("msa", given)
    given["v_cache"].mul_(2)
    torch.testing.assert_close(run("msa", given), 2 * before)


def test_results_may_be_written_to():
    given = tensors()
    first, second = run("msa", given), run("msa", given)
    first.zero_()
    assert torch.equal(second, run("msa", given)) and second.any()
