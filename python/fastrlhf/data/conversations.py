"""Conversations for supervised fine-tuning: tokens, and which of them are to be predicted."""

from __future__ import annotations

from dataclasses import dataclass

from . import forms
from .dataset import Dataset, ExampleStream
from .prompts import PromptReader
from .rows import DataError, Row, Rows, UnusableRow
from .template import Message
from .tokenizer import Tokenizer, encode, encode_answer

MARK = "\ue000answer\ue001"


@dataclass(frozen=True)
class Conversation:
    """loss_mask[t]: whether tokens[t] is to be predicted, an answer's token, the end of sequence among them."""

    tokens: list[int]
    loss_mask: list[bool]
    index: int


class ConversationDataset(Dataset[Conversation]):
    """A prompt and what is to be answered, of rows in one of these forms:

    - `{"prompt", "completion"}`, or two other fields: strings, messages, or a prompt of messages and an answer as string;
    - `{"messages": [...]}` or NeMo-Aligner's `{"system", "mask", "conversations": [{"from", "value"}]}`, with the loss
      on every turn of the assistant; what follows the last is left out;
    - NeMo-Aligner's `{"input", "output"}`;
    - HH-RLHF's or another preference pair, of which `chosen` is the completion.

    The prompt's tokens are those that PromptDataset gives. The answer is encoded apart from them and ends with the
    end-of-sequence token.

    prompt_template, completion_template: format strings over the row's fields instead of prompt_field, completion_field.
    max_tokens: of prompt and answer. overlong: "skip", "error", or "truncate": the first max_tokens tokens, left out
        where none of the answer would remain.
    invalid: "error" or "skip", for an empty prompt or answer.
    """

    OVERLONG = ("skip", "error", "truncate")

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        prompt_field: str = "prompt",
        completion_field: str = "completion",
        prompt_template: str | None = None,
        completion_template: str | None = None,
        overlong: str = "skip",
        invalid: str = "error",
    ) -> None:
        super().__init__(rows, tokenizer, max_tokens, overlong, invalid)
        self.reader = PromptReader(tokenizer, prompt_field, prompt_template)
        self.completion_field = completion_field
        name = "completion_template"
        self.completion_template = None if completion_template is None else forms.Template(completion_template, name)

    def conversation(self, index: int) -> Conversation | None:
        """The conversation of row `index`, None where it is left out as too long or invalid."""
        return self[index]

    def make(self, row: Row, index: int) -> Conversation:
        prompt = None if self._whole(row) else self.reader.of(row)
        if isinstance(prompt, str):
            tokens = self.reader.tokens(row, prompt)
            answer = self._answer(row, prompt)
            mask = [False] * len(tokens)
        else:
            messages = self._messages(row, prompt)
            text, answer = forms.pieces(messages, self.tokenizer, row)
            tokens, mask = self._masked_prompt(row, messages, text)
        answered = encode_answer(self.tokenizer, answer)
        tokens, mask = tokens + answered, mask + [True] * len(answered)
        if self.overlong == "truncate" and any(mask[: self.max_tokens]):
            tokens, mask = tokens[: self.max_tokens], mask[: self.max_tokens]
        self.check_length(row, len(tokens), "the conversation")
        return Conversation(tokens, mask, index)

    def _whole(self, row: Row) -> bool:
        """Whether prompt and answer are one list of messages."""
        has_prompt = self.reader.template or row.has(self.reader.prompt_field)
        return not has_prompt and (row.has("messages") or row.has("conversations"))

    def _answer(self, row: Row, prompt: str) -> str:
        if self.completion_template:
            return self.completion_template.fill(row)
        if forms.is_hh(row) and not row.has(self.completion_field) and not row.has(self.reader.prompt_field):
            field, text = "chosen", forms.hh_turn(row, "chosen")[1]
        else:
            field = self._completion_field(row)
            text = row.text(field)
        if not text.strip():
            raise UnusableRow(f"{row.where}: field {field!r}: the completion is empty")
        return text

    def _completion_field(self, row: Row) -> str:
        stand_ins = ("output", "chosen", "chosen_response")
        if not row.has(self.completion_field):
            return next((field for field in stand_ins if row.has(field)), self.completion_field)
        return self.completion_field

    def _messages(self, row: Row, prompt: list[Message] | None) -> list[Message]:
        """Prompt and answers, ending with the assistant's last."""
        if prompt is None:
            what = "field 'messages'" if row.has("messages") else "field 'conversations'"
            messages = forms.conversation(row)
        else:
            field = self._completion_field(row)
            what = f"field {field!r}"
            messages = [*prompt, *forms.answer_messages(row, row.field(field), what)]
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        if last is None:
            raise UnusableRow(f"{row.where}: {what}: no message of the assistant's")
        if not last:
            raise UnusableRow(f"{row.where}: {what}: the prompt is empty")
        if not messages[last]["content"].strip():
            raise UnusableRow(f"{row.where}: {what}: the completion is empty")
        return messages[: last + 1]

    def _masked_prompt(self, row: Row, messages: list[Message], text: str) -> tuple[list[int], list[bool]]:
        """The tokens of the text before the last answer, and which belong to an earlier answer.

        Which tokens an answer has is told by their place in the text: a token may hold the last characters of one turn
        and the first of the next.
        """
        earlier = [i for i, message in enumerate(messages[:-1]) if message["role"] == "assistant" and i]
        spans = [self._span(row, messages, i, text) for i in earlier]
        if not spans:
            tokens = encode(self.tokenizer, text)
            return tokens, [False] * len(tokens)
        try:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except NotImplementedError:
            raise TypeError("tokenizer: several answers in a conversation need a fast tokenizer, one with offsets") from None
        tokens = list(encoded["input_ids"])
        mask = [False] * len(tokens)
        for start, end in spans:
            inside = [t for t, (a, b) in enumerate(encoded["offset_mapping"]) if start <= a < b <= end]
            ends = [t for t in inside if tokens[t] == self.tokenizer.eos_token_id]
            for t in inside:
                mask[t] = not ends or t <= ends[-1]
        return tokens, mask

    def _span(self, row: Row, messages: list[Message], i: int, text: str) -> tuple[int, int]:
        """Where in the text message i stands, with what the template closes it with."""
        before = forms.chat_text(row, messages[:i], self.tokenizer, True)
        whole = forms.chat_text(row, messages[: i + 1], self.tokenizer, False)
        if whole.startswith(before) and text.startswith(whole):
            return len(before), len(whole)
        # A template may write the last answer otherwise than an earlier one (Qwen3 does): look for a mark in its place.
        content = messages[i]["content"]
        marked = [*messages[:i], {**messages[i], "content": MARK}, *messages[i + 1 : -1]]
        head, found, tail = forms.chat_text(row, marked, self.tokenizer, True).partition(MARK)
        for said in (content, content.strip()):
            if found and text == head + said + tail:
                end = len(head) + len(said)
                closing = next((s for s in self.tokenizer.all_special_tokens if text.startswith(s, end)), "")
                return len(head), end + len(closing)
        raise DataError(
            f"{row.where}: where message {i + 1} stands in the chat template's text cannot be told: one answer a row"
        )


class ConversationStream(ExampleStream[Conversation]):
    """`next(n)` conversations of a ConversationDataset, in an endless order; see ExampleStream."""
