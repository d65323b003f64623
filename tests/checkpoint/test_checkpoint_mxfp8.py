"""MXFP8 by its definition, for every value and scale byte, and in the vendor's exact layout."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint_samples import (
    BF16,
    E4M3,
    assert_same_state,
    cast_state,
    mxfp8_config,
    small_config,
    vendor_state,
    vendor_tensors,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minimax_jax.checkpoint import CheckpointError, dequantize_mxfp8, load_state, plan_load, quantize_mxfp8

ALL_BYTES = np.arange(256, dtype=np.uint8)


def e4m3_by_definition(byte: int) -> float:
    """OCP 8-bit floating point, E4M3: bias 7, no infinities, S.1111.111 is NaN."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def all_pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(values [256 scales, 256], scales [256, 8], what they mean, in float64)."""
    values = np.tile(ALL_BYTES, (256, 1)).view(E4M3)
    scales = np.repeat(ALL_BYTES[:, None], 8, axis=1)
    factors = np.where(ALL_BYTES == 255, np.nan, 2.0 ** (ALL_BYTES.astype(float) - 127))
    meant = np.array([e4m3_by_definition(byte) for byte in range(256)])[None] * factors[:, None]
    return values, scales, meant


@pytest.mark.parametrize("scale_dtype", [np.uint8, ml_dtypes.float8_e8m0fnu])
@pytest.mark.parametrize("value_dtype", [np.uint8, E4M3])
def test_every_value_with_every_scale(value_dtype: np.dtype, scale_dtype: np.dtype) -> None:
    values, scales, meant = all_pairs()
    actual = dequantize_mxfp8(values.view(value_dtype), scales.view(scale_dtype))
    with np.errstate(over="ignore"):
        expected = meant.astype(np.float32)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(meant))
    known = ~np.isnan(meant)
    assert actual[known].tobytes() == expected[known].tobytes()  # signs of zeros too
    inside = known & np.isfinite(expected)
    assert (actual[inside].astype(np.float64) == meant[inside]).all()  # float32 loses nothing, subnormals included
    assert np.isnan(actual[255]).all() and (actual[0, 1] == 2.0**-136)


def test_every_value_with_every_scale_through_a_vendor_checkpoint(tmp_path: Path) -> None:
    config = mxfp8_config(num_attention_heads=16, num_key_value_heads=4, head_dim=16, hidden_size=256)
    tensors = vendor_tensors(config)
    values, scales, meant = all_pairs()
    name = "language_model.model.layers.1.self_attn.q_proj.weight"  # [256, 256] with scales [256, 8]
    tensors[name], tensors[name + "_scale_inv"] = values, scales
    write_checkpoint(tmp_path, tensors)
    with np.errstate(over="ignore"):
        expected = meant.astype(np.float32).T
    for dtype in (np.dtype(np.float32), BF16):
        with plan_load(tmp_path, config, dtype) as plan:
            actual = plan.read("layers.1.self_attn.q_proj")
        np.testing.assert_array_equal(actual.astype(np.float32), expected.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16])
@pytest.mark.parametrize("scale_dtype", [np.uint8, ml_dtypes.float8_e8m0fnu])
def test_a_whole_checkpoint_in_the_vendor_layout(tmp_path: Path, dtype: np.dtype, scale_dtype: np.dtype) -> None:
    config = mxfp8_config()
    tensors = vendor_tensors(config)
    assert tensors["language_model.model.layers.1.block_sparse_moe.experts.3.w2.weight_scale_inv"].shape == (64, 1)
    expected = cast_state(vendor_state(config, tensors), dtype)
    stored = {name: v.view(scale_dtype) if name.endswith("_scale_inv") else v for name, v in tensors.items()}
    write_checkpoint(tmp_path, stored)
    assert_same_state(load_state(tmp_path, config, dtype.name, quantization="none", progress=False), expected)


def test_weights_left_in_bf16_load_beside_quantised_ones(tmp_path: Path) -> None:
    config = mxfp8_config()
    tensors = vendor_tensors(config)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.ones((128, 64), BF16)
    del tensors[name + "_scale_inv"]
    write_checkpoint(tmp_path, tensors)
    expected = cast_state(vendor_state(config, tensors), BF16)
    assert_same_state(load_state(tmp_path, config, quantization="none", progress=False), expected)


def test_problems_with_scales_are_listed_together(tmp_path: Path) -> None:
    config = mxfp8_config()
    tensors = vendor_tensors(config)
    layer = "language_model.model.layers.0."
    del tensors[f"{layer}self_attn.q_proj.weight_scale_inv"]
    tensors[f"{layer}self_attn.k_proj.weight_scale_inv"] = np.zeros((64, 3), np.uint8)
    tensors[f"{layer}self_attn.v_proj.weight_scale_inv"] = np.zeros((64, 2), np.float32)
    tensors[f"{layer}self_attn.o_proj.weight"] = np.zeros((64, 128), BF16)  # its scale is now extra
    tensors[f"{layer}input_layernorm.weight"] = np.zeros(64, E4M3)
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError) as caught:
        plan_load(tmp_path, config)
    assert caught.value.problems == (
        f"{layer}self_attn.q_proj.weight_scale_inv: missing (shape [128, 2], the scales of an MXFP8 weight)",
        f"{layer}self_attn.k_proj.weight_scale_inv: shape [64, 3]: must be [64, 2]",
        f"{layer}input_layernorm.weight: dtype F8_E4M3: must be BF16 or F16 or F32",
        f"{layer}self_attn.v_proj.weight_scale_inv: dtype F32: must be U8 or F8_E8M0",
        f"{layer}self_attn.o_proj.weight_scale_inv: unexpected",
    )


def test_inputs_that_no_block_divides(tmp_path: Path) -> None:
    config = small_config(dense_intermediate_size=40)
    tensors = vendor_tensors(config)
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    tensors[name] = np.zeros((64, 40), E4M3)
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"down_proj.weight: 40 inputs: MXFP8 needs a multiple of 32"):
        plan_load(tmp_path, config)


@pytest.mark.parametrize(
    ("values", "scales"),
    [
        (np.zeros((2, 64), E4M3), np.zeros((2, 3), np.uint8)),
        (np.zeros((2, 33), E4M3), np.zeros((2, 1), np.uint8)),
        (np.zeros((2, 64), np.float32), np.zeros((2, 2), np.uint8)),
        (np.zeros((2, 64), E4M3), np.zeros((2, 2), np.float32)),
        (np.zeros((), E4M3), np.zeros((), np.uint8)),
    ],
)
def test_dequantize_rejects_what_does_not_fit(values: np.ndarray, scales: np.ndarray) -> None:
    with pytest.raises(ValueError, match="MXFP8"):
        dequantize_mxfp8(values, scales)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(hnp.arrays(np.float32, (3, 64), elements=FINITE))
@settings(max_examples=100, deadline=None)
def test_quantize_follows_the_specification(x: np.ndarray) -> None:
    values, scales = quantize_mxfp8(x)
    assert values.dtype == E4M3 and scales.dtype == np.uint8 and scales.shape == (3, 2)
    blocks = x.reshape(3, 2, 32).astype(np.float64)
    largest = np.abs(blocks).max(-1)
    exponents = np.array([-127 if a == 0 else max(-127, int(np.floor(np.log2(a))) - 8) for a in largest.flat])
    np.testing.assert_array_equal(scales.ravel(), exponents + 127)
    # Nearest of all finite e4m3 values to each scaled value, ties to the even mantissa.
    grid = np.array([e4m3_by_definition(byte) for byte in range(0x7F)])
    scaled = blocks / 2.0 ** exponents.reshape(3, 2, 1)
    distance = np.abs(np.abs(scaled)[..., None] - grid)
    nearest = distance.min(-1)
    chosen = np.abs(values.astype(np.float64)).reshape(blocks.shape)
    np.testing.assert_array_equal(np.abs(np.abs(scaled) - chosen), nearest)
    codes = values.view(np.uint8).reshape(blocks.shape) & 0x7F
    tied = (distance == nearest[..., None]).sum(-1) > 1
    assert (codes[tied] % 2 == 0).all()
    np.testing.assert_array_equal(np.signbit(values.astype(np.float32)).reshape(x.shape), np.signbit(x))


def test_quantize_inverts_dequantize_where_it_can() -> None:
    values, scales, _ = all_pairs()
    keep = (np.arange(256) & 0x7F) != 0x7F
    values = np.where(keep, values.view(np.uint8), 0x7E)
    values[:, ::32] = 0x7E  # 448 in each block: the specification's scale is then the one that was used
    meant = dequantize_mxfp8(values, scales)[20:230]
    again = dequantize_mxfp8(*quantize_mxfp8(meant))
    np.testing.assert_array_equal(again, meant)


def test_quantize_marks_blocks_that_are_not_finite() -> None:
    x = np.ones((1, 96), np.float32)
    x[0, 3], x[0, 40] = np.nan, -np.inf
    values, scales = quantize_mxfp8(x)
    assert scales[0, :2].tolist() == [255, 255] and scales[0, 2] == 119
    assert np.isnan(dequantize_mxfp8(values, scales)[0, :64]).all()
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_mxfp8(np.ones((2, 40)))
