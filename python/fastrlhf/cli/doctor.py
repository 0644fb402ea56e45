"""`fastrlhf doctor`: what is installed here, and which implementation each operation will use."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import __version__, ops
from ..ops import backend

EXTRAS = {
    "train": ("transformers", "tokenizers", "safetensors", "yaml", "rich", "tensorboard", "matplotlib", "pyarrow"),
    "hub": ("datasets",),
    "wandb": ("wandb",),
}
PACKAGES = {"yaml": "pyyaml"}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("fastrlhf doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = diagnose()
    print(json.dumps(found, indent=1) if parser.parse_args(list(argv)).json else render(found))
    return 0


def diagnose() -> dict[str, Any]:
    """Sections of names and values, all of which JSON can hold; None is what is not there."""
    return {
        "versions": {
            "fastrlhf": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": _version("numpy"),
            "triton": _version("triton"),
        },
        "cpu": _cpu(),
        "cuda": _cuda(),
        "packages": {
            PACKAGES.get(name, name): {"version": _version(PACKAGES.get(name, name)), "extra": extra}
            for extra, names in EXTRAS.items()
            for name in names
        },
        "backends": _backends(),
    }


def public_ops() -> list[str]:
    """The operations with a choice of backends."""
    names = (name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)))
    return [name for name in names if "backend" in inspect.signature(getattr(ops, name)).parameters]


def render(found: dict[str, Any]) -> str:
    """The same for a reader."""
    packages = {name: p["version"] or f"missing: pip install 'fastrlhf[{p['extra']}]'" for name, p in found["packages"].items()}
    devices = {f"device {i}": d for i, d in enumerate(found["cuda"]["devices"])} or {"devices": None}
    cuda = {k: v for k, v in found["cuda"].items() if k != "devices"} | devices
    names = list(found["backends"])
    width = max(map(len, [*names, *packages, *found["cpu"], *cuda]))
    column = max(len("cpu"), *(len(found["backends"][n]["cpu"]) for n in names))
    lines = []
    for title, values in (("versions", found["versions"]), ("cpu", found["cpu"]), ("cuda", cuda), ("packages", packages)):
        lines += [title, *(f"  {name.ljust(width)}  {_text(value)}" for name, value in values.items()), ""]
    lines.append(f"{'backends'.ljust(width + 2)}  {'cpu'.ljust(column)}  cuda")
    for name in names:
        chosen = found["backends"][name]
        lines.append(f"  {name.ljust(width)}  {chosen['cpu'].ljust(column)}  {chosen['cuda']}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    kernels = importlib.import_module("fastrlhf._cpu") if find_spec("fastrlhf._cpu") else None
    return {
        "model": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels built": kernels is not None,
        "instruction set in use": kernels.isa() if kernels else None,
        "instruction sets": list(kernels.isas()) if kernels else [],
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    built = find_spec("fastrlhf._cuda") is not None
    kernels = importlib.import_module("fastrlhf._cuda") if built else None
    devices = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        devices.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return {
        "kernels built": built,
        "built for": kernels.architectures if kernels else None,
        "torch built with": torch.version.cuda,
        "driver": _driver(),
        "devices": devices,
    }


def _driver() -> str | None:
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in line.split() if word[0].isdigit() and "." in word), line)


def _backends() -> dict[str, dict[str, str]]:
    devices = {"cpu": True, "cuda": torch.cuda.is_available()}
    return {
        op: {device: _choice(op, device) if here else "no device" for device, here in devices.items()} for op in public_ops()
    }


def _choice(op: str, device: str) -> str:
    try:
        return backend.choose(op, torch.empty(1, device=device), None)
    except (ValueError, ImportError) as error:
        return f"none: {str(error).removeprefix(f'{op}: ')}"
