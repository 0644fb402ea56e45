"""Prompts: what a policy is asked in RL."""

from __future__ import annotations

from dataclasses import dataclass

from . import forms
from .dataset import Dataset, ExampleStream
from .rows import Row, Rows, UnusableRow
from .template import Message
from .tokenizer import Tokenizer, encode, encode_start


@dataclass(frozen=True)
class Prompt:
    """tokens: what the model sees; text: the same as text, whole also where the tokens were cut; row: its other fields,
    for rewards; index: the row's index."""

    tokens: list[int]
    text: str
    row: Row
    index: int


class PromptReader:
    """The prompt of a row as text and tokens, the same for every dataset: what is trained is what is asked later.

    In this order, the first that the row has:

    - `template`, a format string over its fields;
    - the field `prompt_field`: a string, taken as it stands, or messages, written by the chat template;
    - `messages`, or NeMo-Aligner's `conversations`, by the chat template; where the last is the assistant's, without it;
    - NeMo-Aligner's `input`;
    - HH-RLHF's `chosen`, up to the last "\\n\\nAssistant:".
    """

    def __init__(self, tokenizer: Tokenizer, prompt_field: str, template: str | None) -> None:
        self.tokenizer, self.prompt_field = tokenizer, prompt_field
        self.template = None if template is None else forms.Template(template)

    def read(self, row: Row) -> tuple[str, list[int]]:
        """(text, tokens). UnusableRow where the prompt is empty, DataError where there is none to read."""
        value = self.of(row)
        if isinstance(value, str):
            return value, self.tokens(row, value)
        text = forms.chat_text(row, value, self.tokenizer, True)
        return text, encode(self.tokenizer, text)

    def of(self, row: Row) -> str | list[Message]:
        """The prompt as text, or as the messages before the assistant's last."""
        if self.template:
            return self.template.fill(row)
        if row.has(self.prompt_field):
            if not isinstance(row[self.prompt_field], (list, tuple)):
                return row.text(self.prompt_field)
            what = f"field {self.prompt_field!r}"
            return self._asked(row, forms.messages(row, row[self.prompt_field], what), what)
        if row.has("messages") or row.has("conversations"):
            what = "field 'messages'" if row.has("messages") else "field 'conversations'"
            return self._asked(row, forms.conversation(row), what)
        if row.has("input"):
            return row.text("input")
        if forms.is_hh(row):
            return forms.hh_turn(row, "chosen")[0]
        return row.text(self.prompt_field)

    def tokens(self, row: Row, text: str) -> list[int]:
        if not text.strip():
            raise UnusableRow(f"{row.where}: the prompt is empty")
        return encode_start(self.tokenizer, text)

    def _asked(self, row: Row, value: list[Message], what: str) -> list[Message]:
        if value[-1]["role"] == "assistant":
            value = value[:-1]
        if not value or not value[-1]["content"].strip():
            raise UnusableRow(f"{row.where}: {what}: the prompt is empty")
        return value


class PromptDataset(Dataset[Prompt]):
    """Prompts of rows, `{"prompt": str}`, `{"messages": [...]}` and the others that PromptReader lists.

    max_tokens: of a prompt. overlong: "skip", "error", or "truncate_left": the last max_tokens tokens, after a
        beginning-of-sequence token if there was one.
    prompt_field: the field that holds the prompt, for instance "question" in GSM8K.
    template: a format string over the row's fields instead, as in "Question: {question}\\nAnswer:".
    invalid: "error" or "skip", for an empty prompt.
    """

    OVERLONG = ("skip", "error", "truncate_left")

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        prompt_field: str = "prompt",
        overlong: str = "skip",
        template: str | None = None,
        invalid: str = "error",
    ) -> None:
        super().__init__(rows, tokenizer, max_tokens, overlong, invalid)
        self.reader = PromptReader(tokenizer, prompt_field, template)

    def prompt(self, index: int) -> Prompt | None:
        """The prompt of row `index`, None where it is left out as too long or invalid."""
        return self[index]

    def make(self, row: Row, index: int) -> Prompt:
        text, tokens = self.reader.read(row)
        if self.overlong == "truncate_left" and len(tokens) > self.max_tokens:
            start = tokens[:1] if tokens[0] == self.tokenizer.bos_token_id else []
            tokens = (start + tokens[len(tokens) - self.max_tokens + len(start) :])[: self.max_tokens]
        self.check_length(row, len(tokens), "the prompt")
        return Prompt(tokens, text, row, index)


class PromptStream(ExampleStream[Prompt]):
    """`next(n)` prompts of a PromptDataset, in an endless order; see ExampleStream."""
