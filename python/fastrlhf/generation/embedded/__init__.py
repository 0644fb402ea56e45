"""The engine of our own: in the trainer's process on the trainer's parameters, or in a process of its own."""

from .engine import EmbeddedEngine
from .process import EmbeddedProcessEngine

__all__ = ["EmbeddedEngine", "EmbeddedProcessEngine"]
