"""Modules, optimizers and random number generators as named tensors and JSON, and back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointError


def load_into(target: nn.Module | Mapping[str, Tensor], tensors: Mapping[str, Tensor], group: str = "model") -> None:
    """Copies tensors into a module, or into a mapping of names to tensors, in place.

    Args:
        tensors: one for each name of the target's `state_dict`, of its shape; converted to its dtype and device.
        group: what to call them in messages.

    Raises:
        CheckpointError: names that are missing or unknown, a shape that differs; the target is as it was.
    """
    own = target.state_dict() if isinstance(target, nn.Module) else target
    _same_names(group, set(tensors), set(own))
    for name, tensor in tensors.items():
        _same_shape(f"{group}: {name}", tensor, own[name])
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimizer by parameter name: nothing depends on the order of its parameters.

    Args:
        names: the parameters by name, as `dict(model.named_parameters())`.

    Returns:
        tensors `<parameter>.<key>`, as `layer.weight.exp_avg`; and the rest as JSON: the groups' members, and which keys each
        parameter has.

    Raises:
        CheckpointError: a parameter of the optimizer that has no name.
    """
    name_of = {id(p): name for name, p in names.items()}
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    groups = []
    for i, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in name_of:
                raise CheckpointError(f"optimizer: a parameter of shape {tuple(parameter.shape)} in group {i} has no name")
        members = [name_of[id(p)] for p in group["params"]]
        groups.append({"params": members})
        for name, parameter in zip(members, group["params"], strict=True):
            state = optimizer.state.get(parameter)
            if not state:
                continue
            own = {k: v for k, v in state.items() if isinstance(v, Tensor)}
            tensors |= {f"{name}.{k}": v for k, v in own.items()}
            entries[name] = {"tensors": list(own), "values": {k: v for k, v in state.items() if k not in own}}
    return tensors, {"groups": groups, "state": entries}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Puts back what `optimizer_tensors` returned. The hyperparameters stay this optimizer's: a run that goes on with another
    configuration goes on as that says, whatever its layout.

    Args:
        names: the parameters of this optimizer by name.
        tensors, state: as `optimizer_tensors` returned them.

    Raises:
        CheckpointError: parameters, groups or shapes that differ from this optimizer's; nothing is changed then.
    """
    name_of = {id(p): name for name, p in names.items()}
    here = [[name_of.get(id(p), f"<unnamed {tuple(p.shape)}>") for p in g["params"]] for g in optimizer.param_groups]
    there = [list(group["params"]) for group in state["groups"]]
    _same_names("optimizer", {n for g in there for n in g}, {n for g in here for n in g})
    if len(there) != len(here) or any(set(a) != set(b) for a, b in zip(there, here)):
        raise CheckpointError(
            f"optimizer: the checkpoint has {len(there)} groups of {[len(g) for g in there]} parameters, expected "
            f"{len(here)} of {[len(g) for g in here]} with the same members"
        )
    for name, entry in state["state"].items():
        for key in entry["tensors"]:
            full = f"{name}.{key}"
            if full not in tensors:
                raise CheckpointError(f"optimizer: {full} is missing in the checkpoint")
            if tensors[full].dim() > 0:
                _same_shape(f"optimizer: {full}", tensors[full], names[name])
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = name_of[id(parameter)]
            entry = state["state"].get(name)
            optimizer.state.pop(parameter, None)
            if entry is not None:
                optimizer.state[parameter] = dict(entry["values"]) | {
                    key: tensors[f"{name}.{key}"].to(_device(key, parameter, group), copy=True) for key in entry["tensors"]
                }


def rng_tensors() -> dict[str, Tensor]:
    """The states of torch's CPU generator, of this process's CUDA device if it is in use, of `random` and of numpy."""
    version, words, gauss = random.getstate()
    key = np.random.get_state(legacy=False)
    assert isinstance(key, dict)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*key["state"]["key"].tolist(), key["state"]["pos"], key["has_gauss"]], dtype=torch.int64),
        "numpy.gauss": torch.tensor([key["gauss"]], dtype=torch.float64),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `rng_tensors` returned; the CUDA state only where there is a CUDA device.

    Raises:
        CheckpointError: a generator's state is missing; nothing is changed then.
    """
    for name in ("torch", "python", "python.gauss", "numpy", "numpy.gauss"):
        if name not in tensors:
            raise CheckpointError(f"rng: {name} is missing in the checkpoint; it has {sorted(tensors)}")
    torch.set_rng_state(tensors["torch"].cpu())
    version, *words = tensors["python"].tolist()
    gauss = tensors["python.gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *key, position, has_gauss = tensors["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, tensors["numpy.gauss"].item()))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].cpu())


def _same_names(group: str, there: set[str], here: set[str]) -> None:
    for names, what in ((here - there, "is missing in the checkpoint"), (there - here, "of the checkpoint is unknown here")):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{group}: {min(names)} {what}{more}")


def _same_shape(name: str, there: Tensor, here: Tensor) -> None:
    if there.shape != here.shape:
        raise CheckpointError(f"{name} has shape {tuple(there.shape)} in the checkpoint, expected {tuple(here.shape)}")


def _device(key: str, parameter: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Step counts stay on the CPU, where torch keeps them, but for optimizers that run without the host."""
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return torch.device("cpu")
    return parameter.device
