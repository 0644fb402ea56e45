"""GENERATION: the engine protocol and the engines behind it."""

from .embedded import EmbeddedEngine, Fleet, Resharded
from .engine import Completion, Engine, Finished, GenerationStats, Sampling

__all__ = ["Completion", "EmbeddedEngine", "Engine", "Finished", "Fleet", "GenerationStats", "Resharded", "Sampling"]
