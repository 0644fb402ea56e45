"""Where a model goes, by name."""

from __future__ import annotations

import torch


def device_of(name: str | None) -> torch.device:
    """A device that can be used here; None is cuda where there is one, else cpu.

    Raises:
        ValueError: no such device, or none here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises depends on how it was built
        raise ValueError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def dtype_of(name: str | None) -> torch.dtype | None:
    """torch's dtype of that name."""
    return None if name is None else getattr(torch, name)
