"""The engine of our own: in the trainer's process on the trainer's parameters, or in a process of its own."""

from .engine import EmbeddedEngine
from .fleet import Fleet
from .process import EmbeddedProcessEngine
from .reshard import Resharded

__all__ = ["EmbeddedEngine", "EmbeddedProcessEngine", "Fleet", "Resharded"]
