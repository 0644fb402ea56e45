"""Models from and to Hugging Face directories: config.json, safetensors (one file, or shards with an index), tokenizer.

Weights are read one at a time and each rank keeps its share. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import extra
from ..parallel import ColumnParallelLinear, ParallelGroups, RowParallelLinear, Stages, VocabParallelEmbedding
from ..parallel.groups import Axis
from ..parallel.layers import whole_of
from ..parallel.sharding import sharding_of
from .config import DecoderConfig
from .decoder import Decoder, RMSNorm
from .export import HEAD, INDEX, WEIGHTS, save_weights
from .heads import ScalarModel
from .lora import Adapter


def read_config(directory: str | Path) -> DecoderConfig:
    """The architecture in a directory's config.json.

    Raises:
        FileNotFoundError, ValueError: no such file, not JSON, or an architecture that is not supported; names the file.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model: {path} does not exist; expected a Hugging Face model directory")
    try:
        return DecoderConfig.from_hf(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_decoder(
    directory: str | Path, *, groups: ParallelGroups | None = None, head: bool = True,
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, stages: Stages | None = None,
    sequence_parallel: bool = False,
) -> Decoder:  # fmt: skip
    """A decoder with the weights of a Hugging Face directory, in `dtype` (None: that of the config's torch_dtype). Each process
    reads what it holds: `stages` and `sequence_parallel` as for `Decoder`.

    Raises:
        FileNotFoundError, ValueError: files or weights that are missing or of another shape; names the first.
    """
    config = read_config(directory)
    try:
        model = Decoder(
            config, groups=groups, head=head, device=device, dtype=dtype or _dtype_of(config), stages=stages,
            sequence_parallel=sequence_parallel,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    _fill(model, directory)
    return model


def load_scalar_model(
    directory: str | Path, *, groups: ParallelGroups | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None, seed: int = 0, stages: Stages | None = None, sequence_parallel: bool = False,
) -> ScalarModel:  # fmt: skip
    """A decoder with a scalar head. From a reward model's directory the head comes with it; over a language model's it
    starts near 0 (`seed`)."""
    decoder = load_decoder(
        directory, groups=groups, head=False, device=device, dtype=dtype, stages=stages, sequence_parallel=sequence_parallel
    )
    source = decoder.config.source
    model = ScalarModel(decoder, mean=source.get("reward_mean", 0.0), std=source.get("reward_std", 1.0))
    found = dict(_read(Path(directory), lambda name: name == HEAD))
    if HEAD not in found:
        return model.initialize_head(seed)
    if found[HEAD].shape != model.score.shape:
        raise ValueError(
            f"{directory}: {HEAD}: expected shape {tuple(model.score.shape)}, the checkpoint has {tuple(found[HEAD].shape)}"
        )
    with torch.no_grad():
        model.score.copy_(found[HEAD])
    return model


def has_scalar_head(directory: str | Path) -> bool:
    """Whether a directory holds a reward model or critic, not only a language model."""
    return any(True for _ in _read(Path(directory), lambda name: name == HEAD))


def save_decoder(
    model: Decoder, directory: str | Path, *, tokenizer: Any = None, dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:  # fmt: skip
    """Write a directory that `load_decoder` and transformers' AutoModelForCausalLM read. Adapters are merged in.

    Collective over all processes. The first writes, and holds no more than one file's weights at a time.
    """
    save_weights(model, {}, model.config.to_hf("CausalLM"), directory, tokenizer, dtype, max_shard_bytes)


def save_scalar_model(
    model: ScalarModel, directory: str | Path, *, tokenizer: Any = None, dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:  # fmt: skip
    """The same for a reward model or critic, which transformers reads with AutoModelForSequenceClassification."""
    config = model.decoder.config.to_hf("ForSequenceClassification")
    config |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    config |= {"reward_mean": model.mean, "reward_std": model.std}
    if tokenizer is not None:
        config["pad_token_id"] = tokenizer.pad_token_id
    save_weights(model.decoder, {HEAD: model.score}, config, directory, tokenizer, dtype, max_shard_bytes)


def named_weights(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every whole weight of this process's stages under its Hugging Face name, adapters merged in. Collective over the
    tensor-parallel group."""
    for place in places(model):
        yield place.name, place.whole()


class Place(NamedTuple):
    """A Hugging Face weight and the module that holds it: `part` of a fused weight, `kind` "weight" or "bias"."""

    name: str
    module: ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding | RMSNorm
    part: str
    kind: str

    @property
    def parameter(self) -> Tensor:
        """What of it this rank holds, as a view; without adapters."""
        held: Tensor = getattr(self.module, self.kind)
        return held[self.module.rows(self.part)] if isinstance(self.module, ColumnParallelLinear) else held

    @property
    def dim(self) -> int | None:
        """Along which tp cuts it."""
        if isinstance(self.module, RowParallelLinear):
            return 1 if self.kind == "weight" else None
        return None if isinstance(self.module, RMSNorm) else 0

    @property
    def axis(self) -> Axis:
        """Over which it is cut."""
        return Axis() if isinstance(self.module, RMSNorm) else self.module.axis

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole weight."""
        shape = list(self.parameter.shape)
        if self.dim is not None:
            shape[self.dim] *= self.axis.size
        return tuple(shape)

    def whole(self) -> Tensor:
        held = self.parameter.detach()
        adapter = getattr(self.module, "adapter", None)
        if isinstance(adapter, Adapter) and self.kind == "weight":
            held = adapter.merge(self.module.weight.detach())
            held = held[self.module.rows(self.part)] if isinstance(self.module, ColumnParallelLinear) else held
        return held if self.dim is None else whole_of(held, self.dim, self.axis)

    def load(self, whole: Tensor) -> None:
        """Copy this rank's share of the whole weight."""
        if isinstance(self.module, RMSNorm):
            _load_norm(self.name, self.module, whole)
        else:
            self.module.load(self.part, self.kind, whole)


def places(model: Decoder, shared: bool = False) -> Iterator[Place]:
    """Where this process holds each Hugging Face weight of its stages; `shared`: also a second copy of a tied embedding."""
    for prefix, module in model.named_modules():
        base = "model." + prefix
        if isinstance(module, ColumnParallelLinear):
            parent = base.rsplit(".", 1)[0]
            kinds = ("weight", "bias") if module.bias is not None else ("weight",)
            for part in module.parts:
                for kind in kinds:
                    yield Place(f"{parent}.{part}.{kind}", module, part, kind)
        elif isinstance(module, RowParallelLinear):
            yield Place(base + ".weight", module, prefix, "weight")
            if module.bias is not None:
                yield Place(base + ".bias", module, prefix, "bias")
        elif isinstance(module, VocabParallelEmbedding):
            if not sharding_of(module.weight).shared:
                yield Place("lm_head.weight" if prefix == "lm_head" else base + ".weight", module, prefix, "weight")
            elif shared:
                yield Place("model.embed_tokens.weight", module, prefix, "weight")
        elif isinstance(module, RMSNorm):
            yield Place(base + ".weight", module, prefix, "weight")


def _load_norm(name: str, module: RMSNorm, whole: Tensor) -> None:
    if whole.shape != module.weight.shape:
        raise ValueError(f"{name}: expected shape {tuple(module.weight.shape)}, the checkpoint has {tuple(whole.shape)}")
    with torch.no_grad():
        module.weight.copy_(whole)


def _loaders(model: Decoder) -> dict[str, Callable[[Tensor], None]]:
    """What takes each Hugging Face weight."""
    return {place.name: place.load for place in places(model, shared=True)}


def load_weights(model: Decoder, weights: Iterator[tuple[str, Tensor]], where: str = "weights") -> None:
    """Fill a decoder from Hugging Face names and whole tensors. What the decoder lacks (a scalar head) is passed over.

    Raises:
        ValueError: a weight that is missing, or of another shape.
    """
    loaders = _loaders(model)
    left = set(loaders)
    for name, tensor in weights:
        if name not in loaders:
            continue
        try:
            loaders[name](tensor)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        left.discard(name)
    if left:
        raise ValueError(f"{where}: {len(left)} weights are missing, the first '{min(left)}'")


def _fill(model: Decoder, directory: str | Path) -> None:
    load_weights(model, _read(Path(directory), set(_loaders(model)).__contains__), str(directory))


def _read(directory: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    safe_open = extra("safetensors").safe_open
    for path in _files(directory):
        with safe_open(path, framework="pt") as f:
            for name in f.keys():  # noqa: SIM118  # not a mapping
                if wanted(name):
                    yield name, f.get_tensor(name)


def _files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"model: neither {WEIGHTS} nor {INDEX} in {directory}; only safetensors are read")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if missing := [n for n in names if not (directory / n).is_file()]:
        raise FileNotFoundError(f"model: {index} names {missing[0]}, which does not exist")
    return [directory / n for n in names]


def _dtype_of(config: DecoderConfig) -> torch.dtype:
    name = config.source.get("dtype") or config.source.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))
