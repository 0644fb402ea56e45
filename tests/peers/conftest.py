"""Hosts that are really installed; the plug-in of an installed fastrlhf must not patch them before a test does."""

from __future__ import annotations

import os

os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
