"""The engine that runs in the trainer's process, on the trainer's parameters."""

from .engine import EmbeddedEngine
from .fleet import Fleet
from .reshard import Resharded

__all__ = ["EmbeddedEngine", "Fleet", "Resharded"]
