"""Tensors across the bridge: addresses prove that nothing is copied; what does not fit is named."""

import types

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch")
from small_batch import OPERATIONS, batch_of, tensors  # noqa: E402

import minimax_jax.torch as bridge  # noqa: E402
import minimax_jax.torch.ops as ops  # noqa: E402
from minimax_jax.torch import Batch, to_jax, to_torch  # noqa: E402
from minimax_jax.torch.tensors import _check_device, result_on  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.bool])
def test_no_copy_either_way(dtype):
    tensor = torch.ones(64, 64).to(dtype)
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    result = jnp.ones((64, 64), array.dtype) + array
    back = to_torch(result)
    assert back.data_ptr() == result.unsafe_buffer_pointer() and back.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_results_over_several_devices_are_gathered(dtype):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    spread = jax.NamedSharding(mesh, jax.P("x"))
    tensor = result_on(torch.device("cpu"), jax.device_put(jnp.arange(8).astype(dtype), spread))
    assert tensor.tolist() == list(range(8))
    assert tensor.dtype == (torch.int64 if dtype == "int32" else getattr(torch, dtype))


def test_int64_becomes_int32_or_is_named():
    assert to_jax(torch.tensor([1, -(2**31)])).tolist() == [1, -(2**31)]
    assert to_jax(torch.zeros(0, dtype=torch.int64)).dtype == jnp.int32
    for number in (2**31, -(2**31) - 1):
        with pytest.raises(ValueError, match=f"x holds {number}: must fit int32"):
            to_jax(torch.tensor([1, number]), "x")


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_read_the_tensors_where_they_lie(name, monkeypatch):
    given, seen = tensors(), []
    compiled = ops._compiled(name)

    def spy(*args, **kwargs):
        seen.extend(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(args))
        result = compiled(*args, **kwargs)
        seen.append(result.unsafe_buffer_pointer())
        return result

    monkeypatch.setattr(ops, "_compiled", lambda _: spy)
    operands, options = OPERATIONS[name]
    result = getattr(bridge, name)(*(given[operand] for operand in operands), batch_of(given), **options)
    batch = ("block_tables", "query_starts", "kv_lens")
    assert seen == [*(given[operand].data_ptr() for operand in (*operands, *batch)), result.data_ptr()]


def off_alignment(tensor):
    """The same values four bytes further on."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)


def test_small_operands_off_their_alignment_are_copied():
    given = tensors()
    operands, options = OPERATIONS["msa"]
    expected = bridge.msa(*(given[operand] for operand in operands), batch_of(given), **options)
    for name in ("q", "idx_q", "block_tables", "query_starts", "kv_lens"):
        given[name] = off_alignment(given[name])
    out = off_alignment(torch.zeros_like(expected))
    address = out.data_ptr()
    bridge.msa(*(given[operand] for operand in operands), batch_of(given), **options, out=out)
    assert torch.equal(out, expected) and out.data_ptr() == address


def changed(**changes):
    return lambda given: {**given, **{name: change(given[name]) for name, change in changes.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(q=lambda t: t.double()), "q is float64: must be one of float32, bfloat16, float16"),
        (changed(q=lambda t: t.int()), "q is int32: must be one of float32"),
        (changed(q=lambda t: t.numpy()), "q is ndarray: must be a torch tensor"),
        (changed(k_cache=lambda t: t.half().double()), "k_cache is float64"),
        (changed(k_cache=lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)), "k_cache is not contiguous"),
        (changed(index_cache=lambda t: t[::2].repeat(2, 1, 1)[::2]), "index_cache is not contiguous"),
        (changed(k_cache=off_alignment), "k_cache starts off a multiple of 64 bytes: must be aligned"),
        (changed(v_cache=lambda t: t.to("meta")), "v_cache is on meta: must be on cpu, as the other operands"),
        (changed(q=lambda t: t.requires_grad_()), "q requires grad: these operations have no gradient"),
        (changed(q=lambda t: t[:, :3].contiguous()), "q's Hq = 3: must be a multiple of k_cache's Hkv = 2"),
        (changed(q=lambda t: t[..., :16].contiguous()), "q has D = 16: must be 32, as in k_cache"),
        (changed(v_cache=lambda t: t[:2]), r"v_cache has shape \(2, 2, 16, 32\): must be \(6, 2, 16, 32\)"),
        (changed(idx_q=lambda t: t[:4]), "idx_q has T = 4: must be 9, as in q"),
        (changed(kv_lens=lambda t: t.float()), "batch.kv_lens is float32: must be one of int32, int64"),
        (changed(kv_lens=lambda t: t + 40), "batch.kv_lens has 80 tokens: must be at most 48"),
        (changed(kv_lens=lambda t: t.long() + 2**32), "batch.kv_lens has 2147483647 tokens: must be at most 48"),
        (changed(q=lambda t: t.to_sparse()), "q is sparse_coo: must be a dense tensor"),
        (changed(query_starts=lambda t: t[:2]), r"batch.query_starts has R \+ 1 = 2: must be 3"),
        (changed(block_tables=lambda t: t.to("meta")), "batch.block_tables is on meta"),
    ],
)
def test_operands_that_do_not_fit_are_named(change, message):
    given = change(tensors())
    operands, options = OPERATIONS["msa"]
    with pytest.raises(ValueError, match=message):
        bridge.msa(*(given[operand] for operand in operands), batch_of(given), **options)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(9, 4, 16), r"out has shape \(9, 4, 16\): must be \(9, 4, 32\), as the result"),
        (torch.zeros(9, 4, 32, dtype=torch.float64), "out is float64"),
        (torch.zeros(9, 4, 32, requires_grad=True), "out requires grad"),
        (torch.zeros(9, 4, 32, device="meta"), "out is on meta"),
    ],
)
def test_out_that_does_not_fit_is_named(out, message):
    given = tensors()
    operands, options = OPERATIONS["msa"]
    with pytest.raises(ValueError, match=message):
        bridge.msa(*(given[operand] for operand in operands), batch_of(given), **options, out=out)


def test_options_and_batch_that_do_not_fit_are_named():
    given = tensors()
    operands = [given[operand] for operand in OPERATIONS["msa"][0]]
    options = OPERATIONS["msa"][1]
    for changes, message in (
        ({"scale": 0.0}, "scale = 0.0: must be a positive number"),
        ({"topk": 0}, "topk = 0"),
        ({"impl": "cutlass"}, "impl = 'cutlass': msa has 'pallas_triton'"),
    ):
        with pytest.raises(ValueError, match=message):
            bridge.msa(*operands, batch_of(given), **{**options, **changes})
    with pytest.raises(ValueError, match="batch is tuple"):
        bridge.msa(*operands, (1, 2), **options)
    with pytest.raises(ValueError, match=r"k has shape \(9, 32\): must be \[T, Hkv, D\]"):
        bridge.write_kv(given["k_cache"], given["v_cache"], torch.zeros(9, 32), torch.zeros(9, 32), torch.zeros(9))
    rows = torch.zeros(9, 2, 32)
    with pytest.raises(ValueError, match="slots is float32"):
        bridge.write_kv(given["k_cache"], given["v_cache"], rows, rows, torch.zeros(9))
    with pytest.raises(ValueError, match="idx_k has D = 8: must be 16, as in index_cache"):
        bridge.write_index(given["index_cache"], torch.zeros(9, 8), torch.zeros(9, dtype=torch.int32))


def test_parameters_are_taken_where_no_gradient_is_wanted():
    given = tensors()
    operands, options = OPERATIONS["msa"]
    expected = bridge.msa(*(given[operand] for operand in operands), batch_of(given), **options)
    given["q"].requires_grad_()
    with torch.no_grad():
        result = bridge.msa(*(given[operand] for operand in operands), batch_of(given), **options)
    assert torch.equal(result, expected) and not result.requires_grad


def test_arrays_and_tensors_that_cannot_cross_are_named():
    with pytest.raises(ValueError, match=r"x is not contiguous \(strides \(1, 2\)\)"):
        to_jax(torch.zeros(2, 3).T.contiguous().T, "x")
    with pytest.raises(ValueError, match="tensor starts off a multiple of 64 bytes"):
        to_jax(torch.zeros(8)[1:])
    with pytest.raises(ValueError, match="tensor is on meta: must be on a CPU or a CUDA device"):
        to_jax(torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match="tensor is complex64"):
        to_jax(torch.zeros(2, dtype=torch.complex64))
    mesh = jax.sharding.Mesh(jax.devices("cpu")[:2], ("x",))
    spread = jax.device_put(jnp.zeros(4), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    with pytest.raises(ValueError, match="array is on 2 devices: must be on one"):
        to_torch(spread)


def test_cuda_tensors_without_jax_on_cuda_are_named():
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("JAX has CUDA here")
    tensor = types.SimpleNamespace(device=torch.device("cuda:0"))
    with pytest.raises(ValueError, match=r"q is on cuda:0: JAX sees no CUDA device; install minimax-jax\[cuda12\]"):
        _check_device("q", tensor)


def test_batch_is_the_kernels_own():
    import minimax_kernels

    assert Batch is minimax_kernels.Batch
