"""Preference pairs: one prompt, the completion that was chosen and the one that was rejected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from . import forms
from .dataset import Dataset, ExampleStream
from .prompts import PromptReader
from .rows import DataError, Row, Rows, TooLong, UnusableRow
from .template import Message
from .tokenizer import Tokenizer, encode, encode_answer


@dataclass(frozen=True)
class Preference:
    """chosen, rejected: the tokens of the completions alone, each ending with the end of sequence; margin: by how much
    the chosen is better, None where the row does not say."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float | None
    index: int


class PreferenceDataset(Dataset[Preference]):
    """Pairs of rows in one of these forms:

    - `{"prompt", "chosen", "rejected"}`, strings, or messages (the completions a string, a message or messages);
    - `{"chosen", "rejected"}`, messages that begin alike and differ in the last;
    - NeMo-Aligner's `{"prompt", "chosen_response", "rejected_response", "chosen_reward"?, "rejected_reward"?}`, with
      margin = chosen_reward - rejected_reward;
    - HH-RLHF's `{"chosen", "rejected"}`, transcripts that are the same up to their last "\\n\\nAssistant:".

    The prompt's tokens are those that PromptDataset gives; each completion is encoded apart from them.

    max_tokens: of the prompt with the longer completion. overlong: "skip", "error", or "truncate": the completions are
        cut at the end, and the pair left out where the prompt leaves no room.
    margin_field: where a row holds the margin, a finite number.
    invalid: "error" or "skip", for an empty prompt or completion and for sides that do not share a prompt.
    """

    OVERLONG = ("skip", "error", "truncate")

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        margin_field: str = "margin",
        prompt_field: str = "prompt",
        prompt_template: str | None = None,
        overlong: str = "skip",
        invalid: str = "error",
    ) -> None:
        super().__init__(rows, tokenizer, max_tokens, overlong, invalid)
        self.reader = PromptReader(tokenizer, prompt_field, prompt_template)
        self.margin_field = margin_field

    def preference(self, index: int) -> Preference | None:
        """The pair of row `index`, None where it is left out as too long or invalid."""
        return self[index]

    def make(self, row: Row, index: int) -> Preference:
        names = ("chosen", "rejected") if not row.has("chosen_response") else ("chosen_response", "rejected_response")
        values = [row.field(name) for name in names]
        has_prompt = bool(self.reader.template) or row.has(self.reader.prompt_field)
        if any(_is_transcript(value) for value in values):
            prompt, answers = self._from_transcripts(row, names, values)
        elif not has_prompt and all(isinstance(value, str) for value in values):
            prompt, answers = self._from_hh(row)
        else:
            asked = self.reader.of(row)
            if isinstance(asked, str):
                prompt = self.reader.tokens(row, asked)
                answers = [self._string(row, name) for name in names]
            else:
                prompt, answers = self._from_messages(
                    row, names, [[*asked, *forms.answer_messages(row, v, f"field {n!r}")] for n, v in zip(names, values)]
                )
        chosen, rejected = (encode_answer(self.tokenizer, answer) for answer in answers)
        if self.overlong == "truncate":
            room = max(0, self.max_tokens - len(prompt))
            if not room:
                raise TooLong(f"{row.where}: the prompt has {len(prompt)} tokens and leaves no room in {self.max_tokens}")
            chosen, rejected = chosen[:room], rejected[:room]
        self.check_length(row, len(prompt) + max(len(chosen), len(rejected)), "the prompt with its longer completion")
        return Preference(prompt, chosen, rejected, self._margin(row), index)

    def _from_hh(self, row: Row) -> tuple[list[int], list[str]]:
        (prompt, chosen), (other, rejected) = forms.hh_turn(row, "chosen"), forms.hh_turn(row, "rejected")
        if prompt != other:
            raise UnusableRow(f"{row.where}: {_differ('chosen', 'rejected', prompt, other)}")
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            _require(row, name, text)
        return self.reader.tokens(row, prompt), [chosen, rejected]

    def _from_transcripts(self, row: Row, names: tuple[str, str], values: list[Any]) -> tuple[list[int], list[str]]:
        sides = [forms.messages(row, value, f"field {name!r}") for name, value in zip(names, values)]
        if sides[0][:-1] != sides[1][:-1]:
            raise UnusableRow(f"{row.where}: {names[0]} and {names[1]} do not share the messages before the last")
        return self._from_messages(row, names, sides)

    def _from_messages(self, row: Row, names: tuple[str, str], sides: list[list[Message]]) -> tuple[list[int], list[str]]:
        answers, prompts = [], []
        for name, side in zip(names, sides):
            if side[-1]["role"] != "assistant":
                raise DataError(f"{row.where}: field {name!r}: the last message is of {side[-1]['role']!r}, not 'assistant'")
            if len(side) < 2:
                raise UnusableRow(f"{row.where}: the prompt is empty")
            _require(row, name, side[-1]["content"])
            prompt, answer = forms.pieces(side, self.tokenizer, row)
            prompts.append(prompt)
            answers.append(answer)
        if prompts[0] != prompts[1]:
            raise UnusableRow(f"{row.where}: {_differ(*names, *prompts)}")
        return encode(self.tokenizer, prompts[0]), answers

    def _string(self, row: Row, name: str) -> str:
        return _require(row, name, row.text(name))

    def _margin(self, row: Row) -> float | None:
        if row.has(self.margin_field):
            return _number(row, self.margin_field)
        if row.has("chosen_reward", "rejected_reward"):
            return _number(row, "chosen_reward") - _number(row, "rejected_reward")
        return None


def _is_transcript(value: Any) -> bool:
    """Whether a side holds its prompt too: messages that do not begin with the assistant's."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 1
        and isinstance(value[0], dict)
        and value[0].get("role") != "assistant"
    )


def _require(row: Row, name: str, text: str) -> str:
    if not text.strip():
        raise UnusableRow(f"{row.where}: field {name!r}: the completion is empty")
    return text


def _differ(left: str, right: str, a: str, b: str) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    parts = f"{a[at : at + 30]!r} and {b[at : at + 30]!r}"
    return f"{left} and {right} do not share a prompt: they differ at character {at + 1}, {parts}"


def _number(row: Row, name: str) -> float:
    value = row.field(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{row.where}: field {name!r}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise DataError(f"{row.where}: field {name!r}: expected a finite number, got {value}")
    return float(value)


class PreferenceStream(ExampleStream[Preference]):
    """`next(n)` pairs of a PreferenceDataset, in an endless order; see ExampleStream."""
