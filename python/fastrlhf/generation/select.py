"""The engine that a configuration names."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from ..config import option
from ..errors import ConfigError
from ..models import Decoder
from ..refit.contract import ContractError
from .embedded import EmbeddedEngine, EmbeddedProcessEngine
from .engine import Engine

ENGINES = ("embedded", "embedded-process", "tensorrt-llm", "vllm", "sglang")
_FOREIGN = {
    "tensorrt-llm": "tensorrt_llm:TensorRTLLMEngine", "vllm": "vllm:VLLMEngine", "sglang": "sglang:SGLangEngine",
}  # fmt: skip


@dataclass
class GenerationConfig:
    """Where completions are drawn, and how that engine gets new weights."""

    engine: str = option(
        "embedded",
        "embedded shares the trainer's weights; embedded-process copies them through shared memory; the others are installed "
        "apart (docs/refit.md).",
        choices=ENGINES,
    )
    mode: str = option(
        "drain",
        "What new weights do to running requests: wait, end them, or let them go on. embedded-process has all three; embedded "
        "always lets them go on; the others wait, and refuse another mode.",
        choices=("drain", "abort", "keep"),
    )
    verify: bool = option(False, "Hash what is copied and compare with what arrived, where the engine can.")
    slots: int = option(
        2, "embedded-process: 2 keeps the old weights until the new ones are whole, 1 overwrites.", low=1, high=2
    )
    timeout: float = option(600.0, "Seconds for each phase of a refit.", above=0)
    options: dict[str, bool | int | float | str] = option({}, "Of the other engines: arguments of their constructor.")
    any_version: bool = option(False, "Use an engine of a version that was not checked.")


def make_engine(config: GenerationConfig, model: Decoder, tokenizer: Any, path: str, **embedded: Any) -> Engine:
    """
    Args:
        path: the model's directory: the others read the architecture and tokenizer from it.
        embedded: options of `EmbeddedEngine`.

    Raises:
        ConfigError: an engine that is not installed, of another version, or that cannot serve this model.
    """
    if config.engine not in ENGINES:
        raise ConfigError(f"generation.engine: expected one of {', '.join(ENGINES)}, got {config.engine!r}")
    if config.engine == "embedded":
        return EmbeddedEngine(model, tokenizer, **embedded)
    try:
        if config.engine == "embedded-process":
            return EmbeddedProcessEngine(
                model, path, slots=config.slots, mode=config.mode, verify=config.verify, timeout=config.timeout, **embedded
            )
        module, _, name = _FOREIGN[config.engine].partition(":")
        cls = getattr(importlib.import_module(f".{module}", __package__), name)
        return cls.launch(
            model, tokenizer, path, options=config.options, mode=config.mode, timeout=config.timeout,
            any_version=config.any_version,
        )  # fmt: skip
    except (ValueError, ImportError, ContractError) as error:
        raise ConfigError(f"generation.engine: {config.engine}: {error}") from error
