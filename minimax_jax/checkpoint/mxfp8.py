"""MXFP8: e4m3 values that share one power-of-two scale per 32 along the last axis.

OCP Microscaling Formats (MX) v1.0, section 5.1: element e4m3 (fn: no infinities, 0x7f and 0xff are NaN),
scale e8m0 (byte b is 2^(b - 127), 255 is NaN). The vendor stores the scale bytes as U8 under
`weight_scale_inv`; despite "_inv" they multiply.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from minimax_jax.tensor_table import MXFP8_BLOCK

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E4M3_MAX = 448.0
_E4M3_MAX_EXPONENT = 8  # 448 = 1.75 * 2^8


def dequantize_mxfp8(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`values * 2^(scales - 127)`, exactly, in float32.

    A product has four significant bits and a least value of 2^-136, so float32 (with subnormals) holds each one
    exactly; above float32's largest it is infinite, and NaN comes from a NaN value or scale byte 255.

    Args:
      values: [..., K], float8_e4m3fn or its bytes as uint8; K a multiple of 32.
      scales: [..., K / 32], uint8 or float8_e8m0fnu.

    Returns:
      [..., K] float32.

    Raises:
      ValueError: if the shapes or the dtypes do not fit.
    """
    if values.dtype not in (_E4M3, np.uint8) or scales.dtype not in (np.uint8, ml_dtypes.float8_e8m0fnu):
        raise ValueError(f"MXFP8 of {values.dtype} values and {scales.dtype} scales: must be e4m3 and e8m0 or u8")
    blocks = mxfp8_scale_shape(values.shape)
    if blocks is None or scales.shape != blocks:
        raise ValueError(
            f"MXFP8 values {values.shape} with scales {scales.shape}: must be [..., K] and [..., K / {MXFP8_BLOCK}]"
        )
    products = _e4m3_table()[values.view(np.uint8)].reshape(*blocks, MXFP8_BLOCK)
    with np.errstate(over="ignore"):
        products *= _e8m0_to_float32(scales.view(np.uint8))[..., None]
    return products.reshape(values.shape)


def quantize_mxfp8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The MX specification's quantiser: scale 2^(floor(log2(amax)) - 8), values rounded to nearest even, saturated.

    Args:
      x: [..., K] floating, K a multiple of 32; taken as float32.

    Returns:
      (values [..., K] float8_e4m3fn, scales [..., K / 32] uint8). A block with a NaN or an infinity gets the NaN
      scale 255; a block of zeros gets scale byte 0.

    Raises:
      ValueError: if K is no multiple of 32.
    """
    x = np.asarray(x).astype(np.float32)
    shape = mxfp8_scale_shape(x.shape)
    if shape is None:
        raise ValueError(f"MXFP8 of shape {x.shape}: the last axis must be a multiple of {MXFP8_BLOCK}")
    blocks = x.reshape(*shape, MXFP8_BLOCK)
    largest = np.abs(blocks).max(axis=-1)
    finite = np.isfinite(largest)
    # frexp writes x = m * 2^e with m in [0.5, 1), so floor(log2(x)) = e - 1, exact for subnormals too.
    exponent = np.frexp(np.where(finite, largest, 1.0))[1] - 1 - _E4M3_MAX_EXPONENT
    exponent = np.where(largest == 0, -127, np.clip(exponent, -127, 127)).astype(np.int32)
    # A power of two changes no bit but where the product is subnormal, which e4m3 has as zero: one rounding in all.
    scaled = np.where(finite[..., None], blocks, 0) * np.ldexp(np.float32(1), -exponent)[..., None]
    values = np.clip(scaled, -_E4M3_MAX, _E4M3_MAX, out=scaled).astype(_E4M3)
    return values.reshape(x.shape), np.where(finite, exponent + 127, 255).astype(np.uint8)


def mxfp8_scale_shape(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the scales of values of `shape`, None if the last axis cannot be cut into blocks."""
    if not shape or shape[-1] % MXFP8_BLOCK:
        return None
    return (*shape[:-1], shape[-1] // MXFP8_BLOCK)


def _e4m3_table() -> np.ndarray:
    """float32 of each e4m3 byte; a look-up beats the cast and takes any layout."""
    return np.arange(256, dtype=np.uint8).view(_E4M3).astype(np.float32)


def _e8m0_to_float32(scale_bytes: np.ndarray) -> np.ndarray:
    """2^(byte - 127) by its bits: the byte is float32's own biased exponent, but for the two ends."""
    bits = scale_bytes.astype(np.uint32) << 23
    bits[scale_bytes == 0] = 0x0040_0000  # 2^-127 is subnormal
    bits[scale_bytes == 255] = 0x7FC0_0000  # NaN, where the exponent alone would say infinity
    return bits.view(np.float32)
