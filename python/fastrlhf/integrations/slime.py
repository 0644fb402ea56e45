"""For slime's command line: `--custom-megatron-init-path fastrlhf.integrations.slime.install` patches each training actor."""

from __future__ import annotations

from typing import Any

from .hosts.slime import HOST
from .patching import apply, log


def install(args: Any = None) -> None:
    """Patches slime in this process and writes the report to the log."""
    log(str(apply(HOST, eager=True)))
