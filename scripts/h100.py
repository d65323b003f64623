"""H100s to compile for on a machine without one; needs a jax with its CUDA plugin, no driver."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # jax reads its environment when it is imported, which scripts set first
    import jax

# what XLA must know of the device that it compiles for: stream_executor.GpuTargetConfigProto
_TARGET = """
gpu_device_info {
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def h100s(count: int) -> Sequence[jax.Device]:
    """So many H100s of one host, which nothing can run on."""
    from jax.experimental import topologies

    return topologies.get_topology_desc("h100", platform="cuda", target_config=_TARGET, topology=f"1x1x{count}").devices


def lowering_for_h100() -> contextlib.AbstractContextManager[object]:
    """A context in which kernels are lowered for an H100: from jax 0.11 on, they ask which device it is for."""
    import jax

    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="cuda")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
