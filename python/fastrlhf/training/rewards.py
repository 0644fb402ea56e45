"""Rewards of completions: Python functions and reward models, weighted and added up, each also reported apart."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import option
from ..data import Prompt
from ..errors import ConfigError, UserError
from ..models import ScalarModel, has_scalar_head, load_scalar_model
from .batches import last_token_scores
from .layout import Layout


class RewardError(UserError, RuntimeError):
    """A reward function that failed or gave what is no reward."""


@dataclass
class RewardSource:
    """One reward: of a function or of a model."""

    name: str = option("", 'What its metrics are called; empty is the function\'s name or "model".')
    function: str | None = option(
        None,
        "module:function or path.py:function, called with prompts=, completions= and the rows' fields, lists all; gives a "
        "number for each.",
    )
    model: str | None = option(None, "Directory of a reward model with the policy's tokenizer.")
    weight: float = option(1.0, "Its share of the sum.")


@dataclass(frozen=True)
class Scored:
    """`total` float32 (B), the weighted sum; `parts`: each source's own, by name, not weighted."""

    total: Tensor
    parts: dict[str, Tensor]


class Rewards:
    """The sources of a run, loaded once.

    Args:
        max_tokens: of a micro-batch through a reward model.

    Raises:
        ConfigError: no source, one that is neither or both, two of one name, a function that cannot be imported, a model
            of another vocabulary.
    """

    def __init__(
        self, sources: Sequence[RewardSource], *, max_tokens: int, vocab_size: int, device: torch.device, dtype: torch.dtype,
        parallel: Layout | None = None,
    ) -> None:  # fmt: skip
        parallel = parallel or Layout()
        self.groups = parallel.groups
        if not sources:
            raise ConfigError("rewards: expected one source or more, got none")
        self.max_tokens = max_tokens
        self.weights: dict[str, float] = {}
        self.functions: dict[str, Callable[..., Any]] = {}
        self.models: dict[str, ScalarModel] = {}
        for i, source in enumerate(sources):
            if (source.function is None) == (source.model is None):
                raise ConfigError(
                    f"rewards.{i}: expected either function or model, got {'neither' if source.model is None else 'both'}"
                )
            name = source.name or (source.function.rpartition(":")[2] if source.function else "model")
            if name in self.weights:
                raise ConfigError(f"rewards.{i}.name: {name!r} is the name of another source")
            self.weights[name] = source.weight
            if source.function is not None:
                self.functions[name] = load_function(source.function)
                continue
            assert source.model is not None
            if not has_scalar_head(source.model):
                raise ConfigError(f"rewards.{i}.model: {source.model} is a language model: it has no score.weight")
            model = load_scalar_model(source.model, device=device, dtype=dtype, **parallel.of(source.model)).eval()
            model.requires_grad_(False)
            if model.decoder.config.vocab_size != vocab_size:
                raise ConfigError(
                    f"rewards.{i}.model: {source.model} has a vocabulary of {model.decoder.config.vocab_size}, "
                    f"the policy of {vocab_size}"
                )
            self.models[name] = model

    def __call__(self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], texts: Sequence[str]) -> Scored:
        """Rewards of completions, `tokens` being prompt and completion, `texts` the completion's text. Collective over all
        processes. Functions see the completions of whole prompts, in each replica a part of them, and are called by one
        process of it.

        Raises:
            RewardError: a function raised, or gave another number of rewards, or one that is not a finite number.
        """
        parts: dict[str, Tensor] = {}
        for name in self.weights:
            if name in self.functions:
                parts[name] = self._share_out(name, prompts, texts)
            else:
                parts[name] = last_token_scores(self.models[name], tokens, max_tokens=self.max_tokens).cpu()
                if not bool(torch.isfinite(parts[name]).all()):
                    raise RewardError(f"reward {name!r}: the model gave a score that is not finite")
        total = torch.zeros(len(tokens))
        for name, scores in parts.items():
            total += self.weights[name] * scores
        return Scored(total, parts)

    def _share_out(self, name: str, prompts: Sequence[Prompt], texts: Sequence[str]) -> Tensor:
        """What a function says, each replica's first process having asked it about its part. An error is raised in all."""
        axis, function = self.groups.replicas, self.functions[name]
        if self.groups.world.size == 1:
            return _call(name, function, prompts, texts)
        bounds = _bounds(prompts, axis.size)
        mine = slice(bounds[axis.rank], bounds[axis.rank + 1])
        said: Any = None
        if self.groups.tp.first and mine.start < mine.stop:
            try:
                said = _call(name, function, prompts[mine], texts[mine], mine.start)
            except RewardError as error:
                said = str(error)
        every: list[Any] = [None] * self.groups.world.size
        dist.all_gather_object(every, said)
        if wrong := next((s for s in every if isinstance(s, str)), None):
            raise RewardError(wrong)
        return torch.cat([s for s in every if s is not None])


def _bounds(prompts: Sequence[Prompt], parts: int) -> list[int]:
    """Where to cut completions into about equal parts, between prompts."""
    starts = [i for i, p in enumerate(prompts) if not i or p is not prompts[i - 1]] + [len(prompts)]
    return [starts[round(k * (len(starts) - 1) / parts)] for k in range(parts + 1)]


def load_function(name: str) -> Callable[..., Any]:
    """What "module:function" or "path/to/file.py:function" names."""
    module_name, _, function = name.rpartition(":")
    if not module_name or not function:
        raise ConfigError(f"reward function: expected module:function, got {name!r}")
    try:
        module = _module(module_name)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"reward function {name!r}: {module_name} could not be imported: {type(error).__name__}: {error}"
        ) from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"reward function {name!r}: {module_name} has no function {function!r}")
    return found


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(name)
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"reward function: {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"fastrlhf_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _call(name: str, function: Callable[..., Any], prompts: Sequence[Prompt], texts: Sequence[str], first: int = 0) -> Tensor:
    """`first`: the number of the first completion, for messages."""
    fields: Mapping[str, list[Any]] = {
        field: [p.row.get(field) for p in prompts]
        for field in dict.fromkeys(f for p in prompts for f in p.row)
        if field not in ("prompts", "completions")
    }
    try:
        given = function(prompts=[p.text for p in prompts], completions=list(texts), **fields)
        rewards = [float(r) for r in given]
    except Exception as error:
        raise RewardError(f"reward {name!r}: the function raised {type(error).__name__}: {error}") from error
    if len(rewards) != len(texts):
        raise RewardError(f"reward {name!r}: expected {len(texts)} rewards, one for each completion, got {len(rewards)}")
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise RewardError(
                f"reward {name!r}: got {reward} for completion {first + i}, {texts[i][:80]!r} of prompt "
                f"{prompts[i].text[-80:]!r}"
            )
    return torch.tensor(rewards, dtype=torch.float32)
