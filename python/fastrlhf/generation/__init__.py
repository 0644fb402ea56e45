"""GENERATION: the engine protocol and the engines behind it."""

from .embedded import EmbeddedEngine, EmbeddedProcessEngine, Fleet, Resharded
from .engine import Completion, Engine, Finished, GenerationStats, Sampling

__all__ = [
    "Completion", "EmbeddedEngine", "EmbeddedProcessEngine", "Engine", "Finished", "Fleet", "GenerationStats", "Resharded",
    "Sampling",
]  # fmt: skip
