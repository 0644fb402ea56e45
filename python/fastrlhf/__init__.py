"""fastrlhf: every RLHF step on kernels that touch memory once."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import arrays as arrays
    from . import ops as ops
    from .integrations import patch as patch
    from .integrations import unpatch as unpatch
    from .ops import *  # noqa: F403  # the ops are the package's face

try:
    __version__ = version("fastrlhf")
except PackageNotFoundError:  # a source tree on the path
    __version__ = "0.0.0"

if os.environ.get("FASTRLHF_PATCH"):
    import_module(".integrations", __name__).install()


def __getattr__(name: str) -> Any:
    """The ops, all at once when one is first asked for: `fastrlhf.arrays` is to be had without torch."""
    if name in ("patch", "unpatch"):
        return getattr(import_module(".integrations", __name__), name)
    if name == "arrays":
        return import_module(".arrays", __name__)
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = import_module(".ops", __name__)
    names = globals()
    names.update({n: getattr(found, n) for n in found.__all__})
    names["ops"], names["__all__"] = found, ["__version__", "ops", "patch", "unpatch", *found.__all__]
    try:
        return names[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
