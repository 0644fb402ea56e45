"""OpenRLHF where flash-attn, deepspeed and vLLM are not: its modules, with stand-ins for what they import and the tests do not
call. `pip install --no-deps --target DIRECTORY openrlhf`; FASTRLHF_OPENRLHF names the directory, by default .venv/openrlhf."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest

DIRECTORY = Path(os.environ.get("FASTRLHF_OPENRLHF", Path(__file__).parents[2] / ".venv" / "openrlhf"))
ABSENT = {
    "deepspeed": (), "deepspeed.ops.adam": (), "deepspeed.runtime.zero.partition_parameters": (), "vllm": (),
    "vllm.inputs": (), "vllm.utils": (), "vllm.worker.worker": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils.distributed": ("all_gather",),
}  # fmt: skip


class Absent(types.ModuleType):
    """Anything may be imported from it."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=f"{self.__name__}.{name}")


def stub(name: str, kind: type[types.ModuleType]) -> None:
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        if path not in sys.modules:
            module = kind(path)
            module.__path__ = []
            module.__spec__ = types.SimpleNamespace(name=path, loader=None, submodule_search_locations=[], _initializing=False)
            sys.modules[path] = module
            if i > 1:
                setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)


def load() -> None:
    """Skips where the modules are not there."""
    if not (DIRECTORY / "openrlhf").is_dir():
        pytest.skip(f"no openrlhf in {DIRECTORY}", allow_module_level=True)
    if str(DIRECTORY) not in sys.path:
        sys.path.append(str(DIRECTORY))
    for name, attributes in ABSENT.items():
        stub(name, types.ModuleType if attributes else Absent)
        for attribute in attributes:
            setattr(sys.modules[name], attribute, mock.MagicMock(name=attribute))
