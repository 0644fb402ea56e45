"""fastrlhf: every RLHF step on kernels that touch memory once."""

from importlib.metadata import PackageNotFoundError, version

from . import ops
from .ops import *  # noqa: F403  # the ops are the package's face

try:
    __version__ = version("fastrlhf")
except PackageNotFoundError:  # a source tree on the path
    __version__ = "0.0.0"

__all__ = ["__version__", "ops", *ops.__all__]
