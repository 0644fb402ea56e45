"""Models from and to Hugging Face directories: config.json, safetensors (one file, or shards with an index), tokenizer.

Weights are read one at a time and each rank keeps its share. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import extra
from ..parallel import ColumnParallelLinear, ParallelGroups, RowParallelLinear, VocabParallelEmbedding
from ..parallel.layers import whole_of
from .config import DecoderConfig
from .decoder import Decoder, RMSNorm
from .heads import ScalarModel
from .lora import Adapter

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "score.weight"


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
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
) -> Decoder:  # fmt: skip
    """A decoder with the weights of a Hugging Face directory, in `dtype` (None: that of the config's torch_dtype).

    Raises:
        FileNotFoundError, ValueError: files or weights that are missing or of another shape; names the first.
    """
    config = read_config(directory)
    model = Decoder(config, groups=groups, head=head, device=device, dtype=dtype or _dtype_of(config))
    _fill(model, directory)
    return model


def load_scalar_model(
    directory: str | Path, *, groups: ParallelGroups | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None, seed: int = 0,
) -> ScalarModel:  # fmt: skip
    """A decoder with a scalar head. From a reward model's directory the head comes with it; over a language model's it
    starts near 0 (`seed`)."""
    decoder = load_decoder(directory, groups=groups, head=False, device=device, dtype=dtype)
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

    Collective over the tensor-parallel group; its first rank writes.
    """
    _save(model, {}, model.config.to_hf("CausalLM"), directory, tokenizer, dtype, max_shard_bytes)


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
    _save(model.decoder, {HEAD: model.score}, config, directory, tokenizer, dtype, max_shard_bytes)


def named_weights(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every whole weight under its Hugging Face name, adapters merged in. Collective over the tensor-parallel group."""
    for prefix, module in model.named_modules():
        base = "model." + prefix
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            yield from _linear_weights(base, module)
        elif isinstance(module, VocabParallelEmbedding):
            name = "lm_head.weight" if prefix == "lm_head" else base + ".weight"
            yield name, whole_of(module.weight, 0, module.axis)
        elif isinstance(module, RMSNorm):
            yield base + ".weight", module.weight


def _linear_weights(base: str, module: ColumnParallelLinear | RowParallelLinear) -> Iterator[tuple[str, Tensor]]:
    weight = module.weight.detach()
    if isinstance(module.adapter, Adapter):
        weight = module.adapter.merge(weight)
    if isinstance(module, RowParallelLinear):
        yield base + ".weight", whole_of(weight, 1, module.axis)
        if module.bias is not None:
            yield base + ".bias", module.bias
        return
    parent = base.rsplit(".", 1)[0]
    for part in module.parts:
        yield f"{parent}.{part}.weight", whole_of(weight[module.rows(part)], 0, module.axis)
        if module.bias is not None:
            yield f"{parent}.{part}.bias", whole_of(module.bias[module.rows(part)], 0, module.axis)


def _loaders(model: Decoder) -> dict[str, Callable[[Tensor], None]]:
    """What takes each Hugging Face weight."""
    out: dict[str, Callable[[Tensor], None]] = {}

    def take(name: str, module: Any, part: str, kind: str) -> None:
        out[name] = lambda whole: module.load(part, kind, whole)

    for prefix, module in model.named_modules():
        base = "model." + prefix
        kinds = ["weight", *(["bias"] if getattr(module, "bias", None) is not None else [])]
        if isinstance(module, ColumnParallelLinear):
            parent = base.rsplit(".", 1)[0]
            for part in module.parts:
                for kind in kinds:
                    take(f"{parent}.{part}.{kind}", module, part, kind)
        elif isinstance(module, RowParallelLinear):
            for kind in kinds:
                take(f"{base}.{kind}", module, prefix, kind)
        elif isinstance(module, VocabParallelEmbedding):
            take("lm_head.weight" if prefix == "lm_head" else base + ".weight", module, prefix, "weight")
        elif isinstance(module, RMSNorm):
            out[base + ".weight"] = _norm_loader(base + ".weight", module)
    return out


def _norm_loader(name: str, module: RMSNorm) -> Callable[[Tensor], None]:
    def load(whole: Tensor) -> None:
        if whole.shape != module.weight.shape:
            raise ValueError(f"{name}: expected shape {tuple(module.weight.shape)}, the checkpoint has {tuple(whole.shape)}")
        with torch.no_grad():
            module.weight.copy_(whole)

    return load


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


def _save(
    model: Decoder, head: Mapping[str, Tensor], config: dict[str, Any], directory: str | Path, tokenizer: Any,
    dtype: torch.dtype | None, max_shard_bytes: int,
) -> None:  # fmt: skip
    directory, writer = Path(directory), model.groups.tp.rank == 0
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in [*head.items(), *named_weights(model)]:
        if not writer:
            continue
        held = tensor.detach().to("cpu", dtype if name != HEAD else torch.float32).contiguous()
        if size and size + held.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = held
        size += held.nbytes
    if not writer:
        return
    directory.mkdir(parents=True, exist_ok=True)
    kind = str(dtype or next(model.parameters()).dtype).removeprefix("torch.")
    config |= {"torch_dtype": kind, "dtype": kind}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file = extra("safetensors.torch").save_file
    if len(shards) == 1:
        save_file(shards[0], directory / WEIGHTS, metadata={"format": "pt"})
    else:
        where: dict[str, str] = {}
        total = 0
        for i, shard in enumerate(shards):
            name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, directory / name, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, name)
            total += sum(t.nbytes for t in shard.values())
        (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _dtype_of(config: DecoderConfig) -> torch.dtype:
    name = config.source.get("dtype") or config.source.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))
