"""From messages to text: the tokenizer's chat template, or a plain default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .tokenizer import Tokenizer, encode

Message = Mapping[str, Any]
NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


def render(messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool) -> list[int]:
    """The tokens of `render_text`, with no others added: a template writes its own beginning of sequence."""
    return encode(tokenizer, render_text(messages, tokenizer, add_generation_prompt))


def render_text(messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool) -> str:
    """Messages, `{"role", "content"}` each, as one text.

    By the tokenizer's own chat template where it has one. Else each message is a line, the assistant's closed by the
    end-of-sequence token, and `add_generation_prompt` writes the beginning of the assistant's line:

        System: Be brief.
        User: Two and two?
        Assistant: Four.<eos>
        User: And one?
        Assistant:

    Whatever a chat template raises of messages that it does not take passes through.
    """
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=add_generation_prompt, tokenize=False
        )
        return str(text)
    lines = []
    for message in messages:
        name = NAMES.get(message["role"], message["role"])
        end = tokenizer.eos_token if message["role"] == "assistant" else ""
        lines.append(f"{name}: {message['content']}{end}\n")
    return "".join(lines) + (f"{NAMES['assistant']}:" if add_generation_prompt else "")
