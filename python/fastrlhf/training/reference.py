"""The policy as it was when the run began, which it is held to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..models import Decoder, adapters_off, load_decoder
from ..models.lora import adapters
from .layout import Layout


class Reference:
    """With adapters the same weights with the adapters off; else `copy`, a second one, of the directory they came from."""

    def __init__(self, model: Decoder, path: str, parallel: Layout) -> None:
        self._model = model
        self.copy: Decoder | None = None
        if not any(adapters(model)):
            self.copy = load_decoder(path, device=model.device, dtype=model.dtype, **parallel.of(path)).eval()
            self.copy.requires_grad_(False)

    @contextmanager
    def model(self) -> Iterator[Decoder]:
        """What a forward inside gives is the reference's."""
        if self.copy is not None:
            yield self.copy
            return
        with adapters_off(self._model):
            yield self._model
