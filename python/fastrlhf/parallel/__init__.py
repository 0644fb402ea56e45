"""PARALLEL: the process groups of tensor, pipeline and data parallelism, and the layers that are sharded over them."""

from .groups import ParallelGroups
from .layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

__all__ = ["ColumnParallelLinear", "ParallelGroups", "RowParallelLinear", "VocabParallelEmbedding"]
