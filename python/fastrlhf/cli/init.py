"""`fastrlhf init`: a tokenizer trained on text, and a model with random weights, as a Hugging Face directory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import REQUIRED, option, section
from ..data import character_tokenizer, open_rows, texts_of, train_tokenizer
from ..errors import UserError
from ..models import Decoder, DecoderConfig, save_decoder
from ..models.config import ARCHITECTURES
from .arguments import arguments, user_errors

VOCAB_MULTIPLE = 8
OURS = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "tokenizer.model", "chat_template.*",
)  # fmt: skip
"""The files of a model directory, of which --overwrite leaves none from before."""


@dataclass
class ModelOptions:
    model_type: str = option("llama", "Family of the architecture.", choices=tuple(ARCHITECTURES))
    hidden_size: int = option(128, "Width of the residual stream.", low=1)
    intermediate_size: int | None = option(
        None, "Width inside the MLP; null for 8/3 of hidden_size, rounded up to a multiple of 16.", low=1
    )
    num_hidden_layers: int = option(4, "Layers.", low=1)
    num_attention_heads: int = option(4, "Query heads of a layer.", low=1)
    num_key_value_heads: int | None = option(None, "Key and value heads of a layer; null for one a query head.", low=1)
    head_dim: int | None = option(None, "Width of a head, an even number; null for hidden_size / num_attention_heads.", low=2)
    max_position_embeddings: int = option(1024, "Context: the most tokens of a sequence.", low=1)
    tie_word_embeddings: bool = option(True, "Whether the output layer is the embedding.")
    rope_theta: float = option(10000.0, "Base of the rotary positions.", above=0)
    rms_norm_eps: float = option(1e-6, "Added to the mean square in a norm.", above=0)
    initializer_range: float = option(0.02, "Standard deviation of the initial weights.", above=0)


@dataclass
class InitOptions:
    """A tokenizer trained on text, and a decoder of random weights, as a Hugging Face directory to train from scratch."""

    output: str = option(REQUIRED, "Directory to write.")
    data: list[str] = option(REQUIRED, "Files the tokenizer is trained on, as in train.jsonl,more.jsonl.gz.")
    fields: list[str] = option(REQUIRED, "Fields of a row that hold text or messages, as in question,answer.")
    vocab_size: int = option(8192, "Tokens at most; the model's vocabulary is rounded up to a multiple of 8.", low=1)
    character_level: bool = option(
        False, "One token for each character of the data instead, whatever vocab_size; for tasks with a small alphabet."
    )
    model: ModelOptions = section(ModelOptions, "the decoder, in Hugging Face's names.")
    seed: int = option(0, "Of the weights.", low=0)
    overwrite: bool = option(False, "Whether a model may be written into a directory that holds something.")


def main(argv: Sequence[str]) -> int:
    options = arguments("init", InitOptions, argv)
    if options is None:
        return 0
    output = Path(options.output).expanduser()
    _check_output(output, options.overwrite)
    with user_errors():
        tokenizer = make_tokenizer(options)
        config = decoder_config(options.model, tokenizer)
        model = Decoder(config).initialize(options.seed)
        _write(model, tokenizer, output)
    print(summary(output, model, tokenizer))
    return 0


def make_tokenizer(options: InitOptions) -> Any:
    """The tokenizer that the options ask for, trained on their data."""
    texts = texts_of(open_rows(list(options.data)), options.fields)
    return character_tokenizer(texts) if options.character_level else train_tokenizer(texts, options.vocab_size)


def decoder_config(options: ModelOptions, tokenizer: Any) -> DecoderConfig:
    """The architecture, with the ids of the tokenizer's special tokens.

    Raises:
        ValueError: sizes that make no decoder; names the option.
    """
    heads = options.num_attention_heads
    if options.head_dim is None and options.hidden_size % heads:
        raise ValueError(
            f"model.hidden_size: expected a multiple of model.num_attention_heads {heads} where model.head_dim is not given, "
            f"got {options.hidden_size}"
        )
    try:
        return DecoderConfig(
            model_type=options.model_type,
            vocab_size=-(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
            hidden_size=options.hidden_size,
            intermediate_size=options.intermediate_size or -(-8 * options.hidden_size // 48) * 16,
            num_hidden_layers=options.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=options.num_key_value_heads or heads,
            head_dim=options.head_dim or options.hidden_size // heads,
            max_position_embeddings=options.max_position_embeddings,
            rms_norm_eps=options.rms_norm_eps,
            rope={"rope_type": "default", "rope_theta": options.rope_theta},
            tie_word_embeddings=options.tie_word_embeddings,
            qkv_bias=options.model_type == "qwen2",
            qk_norm=options.model_type == "qwen3",
            initializer_range=options.initializer_range,
            source={
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
                "sliding_window": None,  # transformers would give a Mistral model one of 4096
            },
        )
    except ValueError as error:
        raise ValueError(f"model.{error}") from None


def _write(model: Decoder, tokenizer: Any, output: Path) -> None:
    """Aside first: what was there before is replaced by a whole model or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".init-") as aside:
        save_decoder(model, aside, tokenizer=tokenizer)
        for pattern in OURS:
            for path in output.glob(pattern):
                path.unlink()
        for path in Path(aside).iterdir():
            path.replace(output / path.name)


def summary(output: Path, model: Decoder, tokenizer: Any) -> str:
    config = model.config
    vocabulary = f"vocabulary {config.vocab_size:,} ({len(tokenizer):,} tokens)"
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(path.stat().st_size for path in output.iterdir() if path.is_file())
    return (
        f"{output}: {config.model_type}, {parameters:,} parameters, {vocabulary}, "
        f"context {config.max_position_embeddings:,}, {size:,} bytes"
    )


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"output: expected a directory, got the file {output}")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"output: {output} is not empty; --overwrite replaces the model in it")
