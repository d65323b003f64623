"""The mesh of devices that a parallel layout runs on."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from minimax_jax.parallel.config import ParallelConfig, ParallelError


def make_mesh(parallel: ParallelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the layout's axes (`ParallelConfig.axis_sizes`) over the first devices, rank r on device r.

    Args:
      devices: None for all of JAX's, those of other processes included.

    Raises:
      ParallelError: if there are too few.
    """
    found = list(jax.devices() if devices is None else devices)
    if len(found) < parallel.num_devices:
        raise ParallelError(f"devices: {len(found)} of them, must be at least {parallel.num_devices}")
    sizes = parallel.axis_sizes
    grid = np.empty(parallel.num_devices, object)
    grid[:] = found[: parallel.num_devices]
    # Auto, said aloud: JAX's own default differs between the ways to make a mesh
    return Mesh(grid.reshape(*sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
