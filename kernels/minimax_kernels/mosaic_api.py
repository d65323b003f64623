"""Mosaic GPU, untyped: versions of JAX before 0.11, one of which checks types, name its parts otherwise."""

from __future__ import annotations

import importlib
from typing import Any

plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
mgpu: Any = importlib.import_module("jax.experimental.mosaic.gpu")
mgpu_utils: Any = importlib.import_module("jax.experimental.mosaic.gpu.utils")
ir: Any = importlib.import_module("jax.extend.mlir.ir")
