"""`fastrlhf generate`: completions of prompts from the command line or a file, drawn with the embedded engine."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..config import REQUIRED, option
from ..data import Prompt, PromptDataset, Row, Rows, Skipped, load_tokenizer, open_rows
from ..data.prompts import PromptReader
from ..data.template import Message
from ..errors import UserError
from ..generation import Completion, EmbeddedEngine, Finished, Sampling
from ..models import load_decoder
from ..models.placement import device_of, dtype_of
from .arguments import arguments, user_errors

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class GenerateOptions:
    """Completions of prompts, printed as they end or written to a file."""

    model: str = option(REQUIRED, "Hugging Face directory of the model and its tokenizer.")
    prompt: list[str] = option([], "A prompt; the option given again is another prompt.")
    data: list[str] = option([], "Files of prompts instead, as in test.jsonl,more.parquet.")
    split: str = option("train", "Split of a directory or hub dataset.")
    prompt_field: str = option("prompt", "Field of a row of data that holds the prompt: text or messages.")
    template: str | None = option(None, "Format string over the fields of a row instead, as in 'Question: {question}'.")
    limit: int | None = option(None, "At most so many rows of data, from the first.", low=1)
    chat: bool = option(False, "Whether a prompt that is text is written as a user's message by the chat template.")
    overlong: str = option(
        "error", "A prompt that with max_tokens exceeds the context: refused, left out, or its end taken.",
        choices=("error", "skip", "truncate_left"),
    )  # fmt: skip
    n: int = option(1, "Completions of each prompt.", low=1)
    max_tokens: int = option(128, "Tokens of a completion at most, its end token among them.", low=1)
    temperature: float = option(1.0, "0 takes the most likely token.", low=0)
    top_k: int = option(0, "Draws among the k most likely tokens; 0 for all.", low=0)
    top_p: float = option(1.0, "Draws among the fewest tokens of this probability together.", above=0, high=1)
    min_p: float = option(0.0, "Draws among tokens at least this times as probable as the most likely one.", low=0, high=1)
    stop: list[str] = option([], "Text that ends a completion and belongs to it; the option given again is another.")
    seed: int = option(0, "The same seed draws the same completions.", low=0)
    output: str | None = option(None, "File of JSON lines, one a completion, in the order of the prompts; null prints them.")
    device: str | None = option(None, "cpu, cuda, cuda:1; null is cuda where there is one.")
    dtype: str | None = option(None, "Of the weights; null is the checkpoint's.", choices=DTYPES)
    max_sequences: int = option(256, "Sequences in the batch at once.", low=1)


def main(argv: Sequence[str]) -> int:
    options = arguments("generate", GenerateOptions, argv, repeated=("prompt", "stop"))
    if options is None:
        return 0
    if bool(options.prompt) == bool(options.data):
        raise UserError(f"prompt, data: expected one of them, got {'both' if options.data else 'neither'}")
    with user_errors():
        model = load_decoder(options.model, device=device_of(options.device), dtype=dtype_of(options.dtype))
        tokenizer = load_tokenizer(options.model)
        engine = EmbeddedEngine(model, tokenizer, max_sequences=options.max_sequences)
        prompts, seeds = read_prompts(options, tokenizer, engine.context)
        sampling = Sampling(
            n=options.n, max_tokens=options.max_tokens, temperature=options.temperature, top_k=options.top_k,
            top_p=options.top_p, min_p=options.min_p, stop_tokens=(tokenizer.eos_token_id,), stop=tuple(options.stop),
        )  # fmt: skip
    with ExitStack() as stack:
        file: IO[str] | None = None
        if options.output is not None:
            with user_errors():
                file = stack.enter_context(Path(options.output).expanduser().open("w", encoding="utf-8"))
        start = time.perf_counter()
        count = _generate(engine, prompts, seeds, sampling, file)
        seconds = time.perf_counter() - start
    tokens = engine.stats.completion_tokens
    print(f"{count} completions, {tokens:,} tokens in {seconds:.2f} s: {tokens / seconds:,.0f} tokens/s", file=sys.stderr)
    return 0


def read_prompts(options: GenerateOptions, tokenizer: Any, context: int) -> tuple[list[Prompt], list[int]]:
    """The prompts to complete, and a seed for each that depends on its row's index alone.

    Raises:
        ValueError: no room for a prompt in the context; what the data's reading raises.
    """
    if options.max_tokens >= context:
        raise ValueError(f"max_tokens: expected less than the model's context of {context}, got {options.max_tokens}")
    if options.prompt:
        rows = Rows.from_list(({"prompt": text} for text in options.prompt), "prompt")
        field, template = "prompt", None
    else:
        rows = open_rows(list(options.data), split=options.split, limit=options.limit)
        field, template = options.prompt_field, options.template
    room = context - options.max_tokens
    dataset = PromptDataset(rows, tokenizer, max_tokens=room, prompt_field=field, overlong=options.overlong, template=template)
    if options.chat:
        dataset.reader = AsUser(tokenizer, field, template)
    draw = random.Random(options.seed)
    prompts, seeds = [], []
    for index in range(len(dataset)):
        prompt, seed = dataset.take(index), draw.getrandbits(62)
        if not isinstance(prompt, Skipped):
            prompts.append(prompt)
            seeds.append(seed)
    if len(prompts) < len(dataset):
        left = len(dataset) - len(prompts)
        print(f"left out {left} of {len(dataset)} prompts: more than {room} tokens", file=sys.stderr)
    if not prompts:
        raise ValueError(f"{rows.name}: no prompt is left")
    return prompts, seeds


class AsUser(PromptReader):
    """Text as the one message of a user."""

    def of(self, row: Row) -> str | list[Message]:
        value = super().of(row)
        return [{"role": "user", "content": value}] if isinstance(value, str) and value.strip() else value


def _generate(engine: EmbeddedEngine, prompts: list[Prompt], seeds: list[int], sampling: Sampling, file: IO[str] | None) -> int:
    """Writes or prints every completion; returns how many there were."""
    done = engine.stream([prompt.tokens for prompt in prompts], sampling, seeds=seeds)
    count = 0
    for finished in done if file is None else _ordered(done, sampling.n):
        prompt, completion = prompts[finished.prompt], finished.completion
        text = engine.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        if file is None:
            title = f"prompt {prompt.index + 1}, sample {finished.sample + 1}"
            print(f"=== {title}: {len(completion.tokens)} tokens, {completion.finish_reason}\n{prompt.text}{text}", flush=True)
        else:
            with user_errors():
                print(_line(prompt, finished.sample, completion, text), file=file, flush=True)
        count += 1
    return count


def _ordered(done: Iterator[Finished], n: int) -> Iterator[Finished]:
    """Completions in the order of prompts and samples, each as soon as all before it have ended."""
    waiting: dict[tuple[int, int], Finished] = {}
    following = (0, 0)
    for finished in done:
        waiting[finished.prompt, finished.sample] = finished
        while following in waiting:
            yield waiting.pop(following)
            prompt, sample = following
            following = (prompt, sample + 1) if sample + 1 < n else (prompt + 1, 0)


def _line(prompt: Prompt, sample: int, completion: Completion, text: str) -> str:
    """`logprob` is of the whole completion, in nats; `row` what the data's row has."""
    fields = {
        "prompt": prompt.text,
        "completion": text,
        "index": prompt.index,
        "sample": sample,
        "tokens": len(completion.tokens),
        "finish_reason": completion.finish_reason,
        "logprob": sum(completion.logprobs),
        "row": dict(prompt.row),
    }
    return json.dumps(fields, ensure_ascii=False, default=str)
