"""PARALLEL: the process groups of tensor, pipeline and data parallelism, and the layers that are sharded over them."""

from .groups import ParallelGroups
from .layers import ColumnParallelLinear, RowParallelLinear, SequenceParallel, VocabParallelEmbedding
from .pipeline import Stages

__all__ = [
    "ColumnParallelLinear", "ParallelGroups", "RowParallelLinear", "SequenceParallel", "Stages", "VocabParallelEmbedding",
]  # fmt: skip
