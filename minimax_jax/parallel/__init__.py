"""Tensor, expert and attention data parallelism: sizes, layouts, meshes, communication, processes."""

from minimax_jax.parallel.config import ParallelConfig, ParallelError
from minimax_jax.parallel.index_split import IndexSplit
from minimax_jax.parallel.layout import Layout
from minimax_jax.parallel.mesh import check_processes, make_mesh
from minimax_jax.parallel.processes import Processes, ProcessesConfig, start_processes
from minimax_jax.parallel.ranks import Ranks

__all__ = [
    "IndexSplit",
    "Layout",
    "ParallelConfig",
    "ParallelError",
    "Processes",
    "ProcessesConfig",
    "Ranks",
    "check_processes",
    "make_mesh",
    "start_processes",
]
