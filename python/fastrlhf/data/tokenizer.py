"""Tokenizers: loading one, training one, and the two encodings that every example is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import extra
from .rows import Rows

END, TURN, TURN_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Tokenizer(Protocol):
    """What is used of a Hugging Face PreTrainedTokenizer or PreTrainedTokenizerFast."""

    chat_template: Any
    eos_token: Any
    eos_token_id: Any
    bos_token_id: Any
    all_special_tokens: Any

    def __call__(self, text: str, **options: Any) -> Any: ...
    def encode(self, text: str, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model directory, or of a hub name, as transformers.AutoTokenizer reads it.

    A tokenizer without a padding token pads with its end-of-sequence token. FileNotFoundError where a path holds no
    tokenizer, ValueError where the tokenizer has no end-of-sequence token: nothing would tell generation to stop.
    """
    transformers = extra("transformers")
    local = Path(path).is_dir()
    if not local and (Path(path).is_absolute() or str(path).startswith(("./", "../", "~"))):
        raise FileNotFoundError(f"{path}: no such directory")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=local)
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(f"{path}: no tokenizer can be loaded from here: {error}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no end-of-sequence token (eos_token in tokenizer_config.json)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = (END, TURN, TURN_END),
    chat_template: str | None = None,
) -> Any:
    """A byte-level BPE tokenizer trained on `texts`, as a transformers.PreTrainedTokenizerFast.

    Any text can be encoded and comes back unchanged; a number is one token a digit; the same texts give the same
    tokenizer.

    vocab_size: all in all, at least 256 bytes + the special tokens + padding; less comes out where the texts hold
        fewer merges.
    special_tokens: the first is the end of a sequence. A padding token `<|pad|>` is added.
    chat_template: Jinja; ChatML where it is not given and `<|im_start|>`, `<|im_end|>` are special tokens.
    """
    tokenizers = extra("tokenizers")
    transformers = extra("transformers")
    specials = list(dict.fromkeys((*special_tokens, PAD)))
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if not special_tokens:
        raise ValueError("special_tokens: expected at least the end of a sequence, got none")
    if vocab_size < len(alphabet) + len(specials):
        least = len(alphabet) + len(specials)
        raise ValueError(f"vocab_size: expected at least {least}, for the bytes and special tokens, got {vocab_size}")

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=specials[0], pad_token=PAD, clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [s for s in specials if s not in (specials[0], PAD)]})
    if chat_template is None and {TURN, TURN_END} <= set(specials):
        chat_template = CHATML
    tokenizer.chat_template = chat_template
    return tokenizer


def texts_of(rows: Rows, fields: Sequence[str]) -> Iterator[str]:
    """The text of these fields of every row, one after another; of messages, their contents. For `train_tokenizer`.

    DataError naming the line where a field is missing or holds something else.
    """
    if isinstance(fields, str):
        raise TypeError(f"fields: expected a list of names, got the string {fields!r}")
    for row in rows:
        for field in fields:
            value = row.field(field)
            if isinstance(value, list):
                for i, message in enumerate(value):
                    content = message.get("content") if isinstance(message, dict) else message
                    yield row.as_text(content, f"field {field!r}, message {i + 1}")
            else:
                yield row.text(field)


def encode_start(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text that begins a sequence: with the tokenizer's beginning-of-sequence token, if it sets one."""
    bos = tokenizer.bos_token_id
    tokens: list[int] = encode(tokenizer, text)
    if bos is None or tokens[:1] == [bos] or list(tokenizer.encode(""))[:1] != [bos]:
        return tokens
    return [bos, *tokens]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text as it stands."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of what the model is to say, encoded apart from what stands before it, up to and with one
    end-of-sequence token: what a template writes after that is cut, and where the text has none it is added."""
    eos = tokenizer.eos_token_id
    tokens = encode(tokenizer, text)
    ends = [t for t, token in enumerate(tokens) if token == eos]
    return tokens[: ends[-1] + 1] if ends else [*tokens, eos]
