"""Importing this patches verl: it is what the `verl.plugins` entry point and VERL_USE_EXTERNAL_MODULES name.

verl hides what a plugin raises; the report goes to the log at INFO, whatever becomes of the seams.
"""

from __future__ import annotations

from .hosts.verl import HOST
from .patching import apply, log
from .seam import logger

try:
    REPORT = apply(HOST, eager=True)
    log(str(REPORT))
except Exception:
    logger.exception("fastrlhf did not patch verl")
    raise
