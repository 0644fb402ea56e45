"""The engine that runs in the trainer's process, on the trainer's parameters."""

from .engine import EmbeddedEngine

__all__ = ["EmbeddedEngine"]
