"""Typed configurations: dataclasses whose fields carry their help and bounds, loaded from YAML and `--a.b value`.

A configuration is a dataclass whose fields come from `option` and `section`::

    @dataclass
    class Optimizer:
        lr: float = option(1e-6, "Learning rate.", low=0)
        betas: list[float] = option([0.9, 0.95], "Decay of the two moments.", low=0, high=1)

    @dataclass
    class Train:
        model: str = option(REQUIRED, "Hugging Face directory of the policy.")
        optimizer: Optimizer = section(Optimizer, "How weights move.", lr=1e-5)

    config = load(Train, Path("run.yaml"), ["--optimizer.lr", "3e-6"])
"""

from ..errors import ConfigError
from .describing import describe
from .fields import REQUIRED, option, section
from .loading import load, to_dict, to_yaml

__all__ = ["REQUIRED", "ConfigError", "describe", "load", "option", "section", "to_dict", "to_yaml"]
