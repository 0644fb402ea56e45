"""The functions people use today, where they are installed."""

from __future__ import annotations

import importlib
import os
from typing import Any

os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # its own functions, not ours in their place


def find(module: str, name: str) -> Any | None:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:
        return None


def trl(name: str) -> Any | None:
    return find("trl.trainer.utils", name)


def verl_functional(name: str) -> Any | None:
    return find("verl.utils.torch_functional", name)


def verl_algorithm(name: str) -> Any | None:
    return find("verl.trainer.ppo.core_algos", name)


def verl_linear_cross_entropy() -> Any | None:
    """Triton; (hidden, weight, labels, temperature) to log-probs and entropies, differentiable."""
    return find("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")


def liger_cross_entropy() -> Any | None:
    """Writes the gradient over the logits in its forward."""
    return find("liger_kernel.transformers.functional", "liger_cross_entropy")


def liger_selective_log_softmax() -> Any | None:
    """Over (B, L + 1, V): the last position of each sequence is left out. No gradient."""
    return find("liger_kernel.ops.grpo_loss", "fused_selective_log_softmax")


def flash_attention_cross_entropy() -> Any | None:
    """Returns losses and z-losses."""
    return find("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for name in ("torch", "triton", "trl", "verl", "liger-kernel", "flash-attn", "numpy"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out
