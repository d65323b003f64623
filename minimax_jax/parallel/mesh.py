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
      ParallelError: if there are too few, or several processes have more than take part.
    """
    if devices is None:
        check_processes(parallel)
    found = list(jax.devices() if devices is None else devices)
    if len(found) < parallel.num_devices:
        raise ParallelError(f"devices: {len(found)} of them, must be at least {parallel.num_devices}")
    sizes = parallel.axis_sizes
    grid = np.empty(parallel.num_devices, object)
    grid[:] = found[: parallel.num_devices]
    # Auto, said aloud: JAX's own default differs between the ways to make a mesh
    return Mesh(grid.reshape(*sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def check_processes(parallel: ParallelConfig) -> None:
    """Whether a layout takes all devices of several processes: one without a part could not run the others' steps.

    Raises:
      ParallelError: if there are several processes and it does not, or they cannot be on as many hosts as it names.
    """
    processes, devices = jax.process_count(), len(jax.devices())
    if processes > 1 and parallel.num_devices != devices:
        raise ParallelError(
            f"tensor = {parallel.tensor}, expert = {parallel.expert}, attention_data = {parallel.attention_data}: take "
            f"{parallel.num_devices} devices, must be the {devices} of all {processes} processes (this one has "
            f"{len(jax.local_devices())})"
        )
    if processes > 1 and processes % parallel.hosts:
        raise ParallelError(f"hosts = {parallel.hosts}: must divide the {processes} processes, each of which is on one")
