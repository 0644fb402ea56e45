"""A tokenizer with one token a character, for small tasks with a small alphabet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import extra
from .tokenizer import END, PAD

UNKNOWN = "<|unk|>"


def character_tokenizer(texts: Iterable[str], *, chat_template: str | None = None) -> Any:
    """One token for each character of the texts, as a transformers.PreTrainedTokenizerFast.

    Text of these characters comes back unchanged; each other character is `<|unk|>`. `<|endoftext|>` ends a sequence,
    `<|pad|>` pads. The same characters give the same tokenizer. ValueError where the texts hold none.
    """
    tokenizers = extra("tokenizers")
    transformers = extra("transformers")
    alphabet = sorted({character for text in texts for character in text})
    if not alphabet:
        raise ValueError("texts: expected text with at least one character, got none")
    specials = [END, PAD, UNKNOWN]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=END, pad_token=PAD, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer
