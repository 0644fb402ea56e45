"""The forms in which a row may hold its example, read into messages or strings; each error names file and line."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from .rows import DataError, Row, UnusableRow
from .template import Message, render_text
from .tokenizer import Tokenizer

HH_TURN = "\n\nAssistant:"


def messages(row: Row, value: Any, what: str) -> list[Message]:
    """A list of `{"role": str, "content": str, ...}` with at least one."""
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{row.where}: {what}: expected a list of messages, got {type(value).__name__}")
    if not value:
        raise UnusableRow(f"{row.where}: {what}: the list of messages is empty")
    for i, message in enumerate(value):
        place = f"{what}, message {i + 1}"
        if not isinstance(message, Mapping):
            raise DataError(f"{row.where}: {place}: expected an object, got {type(message).__name__}")
        for key in ("role", "content"):
            if key not in message:
                raise DataError(f"{row.where}: {place}: no {key!r}; it has {list(message)}")
            row.as_text(message[key], f"{place}, {key!r}")
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def nemo_messages(row: Row) -> list[Message]:
    """NeMo-Aligner's chat form, `{"system": str, "mask": "User", "conversations": [{"from", "value"}]}`, as messages.

    Turns from `mask` ("User" where it is absent) are the user's, the others the assistant's, on which the loss is.
    A turn's "label" is not read.
    """
    turns = row.field("conversations")
    mask = row.text("mask") if row.has("mask") else "User"
    if mask.lower() in ("assistant", "gpt"):
        raise DataError(f"{row.where}: field 'mask' is {mask!r}: only a loss on the assistant's turns is supported")
    if not isinstance(turns, (list, tuple)):
        raise DataError(f"{row.where}: field 'conversations': expected a list of turns, got {type(turns).__name__}")
    result: list[Message] = []
    if row.has("system") and row.text("system").strip():
        result.append({"role": "system", "content": row["system"]})
    for i, turn in enumerate(turns):
        place = f"field 'conversations', turn {i + 1}"
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise DataError(f"{row.where}: {place}: expected an object with 'from' and 'value', got {turn!r:.80}")
        speaker = row.as_text(turn["from"], f"{place}, 'from'")
        content = row.as_text(turn["value"], f"{place}, 'value'")
        user = speaker == mask or speaker.lower() in ("human", "user")
        result.append({"role": "user" if user else "assistant", "content": content})
    return messages(row, result, "field 'conversations'")


def answer_messages(row: Row, value: Any, what: str) -> list[Message]:
    """An answer, a string, a message or messages, as messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": row.as_text(value, what)}]
    return messages(row, [value] if isinstance(value, Mapping) else value, what)


def conversation(row: Row) -> list[Message]:
    """The messages of a row that has a field `messages` or NeMo-Aligner's `conversations`."""
    if row.has("messages"):
        return messages(row, row["messages"], "field 'messages'")
    return nemo_messages(row)


def hh_turn(row: Row, field: str) -> tuple[str, str]:
    """HH-RLHF's transcript, `"\\n\\nHuman: ...\\n\\nAssistant: ..."`, as the text up to and with the last
    `"\\n\\nAssistant:"`, and what the assistant says then."""
    text = row.text(field)
    start = text.rfind(HH_TURN)
    if start < 0:
        raise DataError(f"{row.where}: field {field!r}: no turn '\\n\\nAssistant:' in {text[:60]!r}")
    return text[: start + len(HH_TURN)], text[start + len(HH_TURN) :]


def is_hh(row: Row) -> bool:
    return isinstance(row.get("chosen"), str) and HH_TURN in row["chosen"]


def chat_text(row: Row, value: list[Message], tokenizer: Tokenizer, generate: bool) -> str:
    """`render_text`, with what a chat template refuses told of the row."""
    try:
        return render_text(value, tokenizer, generate)
    except Exception as error:  # a template is a program: it raises its own errors and any of Jinja's and Python's
        raise DataError(f"{row.where}: the chat template does not take these messages: {error}") from error


def pieces(value: list[Message], tokenizer: Tokenizer, row: Row) -> tuple[str, str]:
    """(prompt, answer) of messages that end with the assistant's: as text, the prompt as generation would see it."""
    prompt = chat_text(row, value[:-1], tokenizer, True)
    whole = chat_text(row, value, tokenizer, False)
    if not whole.startswith(prompt):
        raise DataError(
            f"{row.where}: the chat template writes message {len(value)} in such a way that the prompt before it, "
            f"ending in {prompt[-40:]!r}, does not begin the whole"
        )
    return prompt, whole[len(prompt) :]


class Template:
    """A format string over the fields of a row, as in `"Question: {question}\\nAnswer:"`; braces are written twice.

    ValueError where it is not one or names no field.
    """

    def __init__(self, text: str, name: str = "template") -> None:
        self.text, self.name = text, name
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{name}: {error} in {text!r}") from None
        self.fields = [field for _, field, _, _ in parts if field is not None]
        if not self.fields:
            raise ValueError(f"{name}: names no field in {text!r}")
        for field, spec, conversion in ((p[1], p[2], p[3]) for p in parts if p[1] is not None):
            if not field or any(c in field for c in ".[]") or spec or conversion or field.isdigit():
                raise ValueError(f"{name}: expected plain field names in braces, got {text!r}")

    def fill(self, row: Row) -> str:
        """The text with this row's fields; UnusableRow where all are blank, DataError where one is not there or no text."""
        values = {field: self._text(row, field) for field in self.fields}
        if not any(value.strip() for value in values.values()):
            raise UnusableRow(f"{row.where}: {self.name}: {' and '.join(self.fields)} empty")
        return self.text.format_map(values)

    def _text(self, row: Row, field: str) -> str:
        value = row.field(field)
        if isinstance(value, (int, float)):
            return str(value)
        return row.text(field)
