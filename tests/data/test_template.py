"""Messages as text: the tokenizer's template, the plain default, and rows in which messages are no messages."""

from __future__ import annotations

import re

import pytest
from fastrlhf.data import DataError, PromptDataset, render, render_text
from fastrlhf.data.forms import Template
from fastrlhf.data.rows import Row

from .conftest import rows

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And one?"},
]


def test_own_template(tokenizer):
    text = render_text(CHAT, tokenizer, True)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n") and text.endswith("<|im_start|>assistant\n")
    assert render_text(CHAT, tokenizer, False) + "<|im_start|>assistant\n" == text
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert render(CHAT, tokenizer, True) == list(expected)


def test_default_template(plain_tokenizer):
    text = "System: Be brief.\nUser: Two and two?\nAssistant: Four.<|endoftext|>\nUser: And one?\n"
    assert render_text(CHAT, plain_tokenizer, False) == text
    assert render_text(CHAT, plain_tokenizer, True) == text + "Assistant:"
    tokens = render(CHAT, plain_tokenizer, True)
    assert tokens.count(plain_tokenizer.eos_token_id) == 1 and plain_tokenizer.decode(tokens) == text + "Assistant:"


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "mem:1: field 'messages': the list of messages is empty"),
        ("hi", "mem:1: field 'messages': expected a list of messages, got str"),
        (["hi"], "mem:1: field 'messages', message 1: expected an object, got str"),
        ([CHAT[0], {"content": "x"}], "mem:1: field 'messages', message 2: no 'role'; it has ['content']"),
        ([{"role": "user"}], "mem:1: field 'messages', message 1: no 'content'; it has ['role']"),
        ([{"role": "user", "content": 3}], "mem:1: field 'messages', message 1, 'content': expected a string, got int"),
        ([{"role": "user", "content": " "}], "mem:1: field 'messages': the prompt is empty"),
        ([CHAT[2]], "mem:1: field 'messages': the prompt is empty"),
    ],
)
def test_messages_that_are_none(tokenizer, value, message):
    with pytest.raises(DataError, match="^" + re.escape(message)):
        PromptDataset(rows({"messages": value}), tokenizer, max_tokens=100).prompt(0)


def test_template_that_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="mem:1: the chat template does not take these messages: roles must alternate"):
        PromptDataset(rows({"messages": CHAT}), tokenizer, max_tokens=100).prompt(0)


def test_format_string():
    fill = Template("Q: {q} of {{{n}}}\nA:").fill
    assert fill(Row({"q": "why", "n": 3}, "f:1")) == "Q: why of {3}\nA:"
    assert fill(Row({"q": "{n} {{", "n": 3}, "f:1")) == "Q: {n} {{ of {3}\nA:"
    for fields, message in (
        ({"q": "why"}, "f:1: no field 'n'; the row has ['q']"),
        ({"q": None, "n": 3}, "f:1: field 'q' is null"),
        ({"q": ["a"], "n": 3}, "f:1: field 'q': expected a string, got list"),
        ({"q": " ", "n": ""}, "f:1: template: q and n empty"),
    ):
        with pytest.raises(DataError, match="^" + re.escape(message)):
            fill(Row(fields, "f:1"))


@pytest.mark.parametrize("text", ["no field", "{q", "{}", "{0}", "{q.__class__}", "{q[0]}", "{q!r}", "{q:>9}"])
def test_format_string_errors(text):
    with pytest.raises(ValueError, match=r"^template: "):
        Template(text)
