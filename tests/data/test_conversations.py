"""Conversations: the prompt as in RL, the loss on answers and the end only, every form of a row."""

from __future__ import annotations

import re

import pytest
from fastrlhf.data import ConversationDataset, ConversationStream, DataError, PromptDataset, Skipped, TooLong, open_rows

from .conftest import real, rows

END = "<|endoftext|>"
HH = "\n\nHuman: a\n\nAssistant:"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def parts(tokenizer, conversation):
    """(text without loss, text with loss)"""
    pairs = list(zip(conversation.tokens, conversation.loss_mask, strict=True))
    return tuple(tokenizer.decode([t for t, m in pairs if m is side]) for side in (False, True))


ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
FORMS = [
    ({"prompt": "hi", "completion": " yo"}, {}, "hi", " yo" + END),
    ({"prompt": "hi\n", "completion": "\nyo"}, {}, "hi\n", "\nyo" + END),
    ({"question": "hi", "answer": " yo"}, {"prompt_field": "question", "completion_field": "answer"}, "hi", " yo" + END),
    ({"q": "hi", "a": "yo"}, {"prompt_template": "Q: {q}\nA:", "completion_template": " {a}!"}, "Q: hi\nA:", " yo!" + END),
    ({"input": "hi", "output": "yo"}, {}, "hi", "yo" + END),
    ({"prompt": [user("hi")], "completion": [assistant("yo")]}, {}, ASKED, "yo<|im_end|>\n" + END),
    ({"prompt": [user("hi")], "completion": "yo"}, {}, ASKED, "yo<|im_end|>\n" + END),
    ({"messages": [user("hi"), assistant("\n\nyo")]}, {}, ASKED, "\n\nyo<|im_end|>\n" + END),
    ({"messages": [user("hi"), assistant("yo"), user("left out")]}, {}, ASKED, "yo<|im_end|>\n" + END),
    ({"mask": "User", "system": "", "conversations": [{"from": "User", "value": "hi"}, {"from": "Assistant", "value": "yo"}]},
     {}, ASKED, "yo<|im_end|>\n" + END),
    ({"chosen": HH + " yo", "rejected": HH + " no"}, {}, HH, " yo" + END),
    ({"prompt": "hi", "chosen": "yo", "rejected": "no"}, {}, "hi", "yo" + END),
]  # fmt: skip


@pytest.mark.parametrize("row, options, prompt, answer", FORMS)
def test_forms(tokenizer, row, options, prompt, answer):
    conversation = ConversationDataset(rows(row), tokenizer, max_tokens=100, **options).conversation(0)
    assert parts(tokenizer, conversation) == (prompt, answer)
    assert conversation.index == 0
    assert conversation.tokens[-1] == tokenizer.eos_token_id and conversation.tokens.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("row, options, prompt, answer", [form for form in FORMS if "left out" not in str(form)])
def test_the_prompt_is_that_of_reinforcement_learning(tokenizer, row, options, prompt, answer):
    names = {"prompt_field": "prompt_field", "prompt_template": "template"}
    asked = PromptDataset(rows(row), tokenizer, max_tokens=99, **{names[k]: v for k, v in options.items() if k in names})
    tokens = asked.prompt(0).tokens
    conversation = ConversationDataset(rows(row), tokenizer, max_tokens=100, **options).conversation(0)
    assert conversation.tokens[: len(tokens)] == tokens
    assert not any(conversation.loss_mask[: len(tokens)]) and all(conversation.loss_mask[len(tokens) :])


TURNS = [{"role": "system", "content": "s"}, user("a b"), assistant("c\n\nd"), user("e"), assistant("\nf")]


def test_several_answers(tokenizer):
    conversation = ConversationDataset(rows({"messages": TURNS}), tokenizer, max_tokens=200).conversation(0)
    without, answers = parts(tokenizer, conversation)
    assert answers == "c\n\nd<|im_end|>\n\nf<|im_end|>\n" + END
    assert tokenizer.decode(conversation.tokens) == tokenizer.apply_chat_template(TURNS, tokenize=False) + END
    assert "<|im_start|>" not in answers and without.endswith("assistant\n")
    prompt = PromptDataset(rows({"messages": TURNS}), tokenizer, max_tokens=200).prompt(0)
    assert conversation.tokens[: len(prompt.tokens)] == prompt.tokens


def test_several_answers_by_the_default_template(plain_tokenizer):
    conversation = ConversationDataset(rows({"messages": TURNS}), plain_tokenizer, max_tokens=200).conversation(0)
    assert parts(plain_tokenizer, conversation)[1] == f" c\n\nd{END} \nf{END}"
    assert plain_tokenizer.decode(conversation.tokens).endswith(f"Assistant: \nf{END}")


def test_end_of_turn_that_is_the_end_of_sequence(tokenizer):
    """As in Qwen's and Llama's chat models."""
    tokenizer.eos_token = "<|im_end|>"
    conversation = ConversationDataset(rows({"messages": TURNS}), tokenizer, max_tokens=200).conversation(0)
    assert parts(tokenizer, conversation)[1] == "c\n\nd<|im_end|>\nf<|im_end|>"
    assert conversation.tokens[-1] == tokenizer.eos_token_id


def test_template_in_which_the_prompt_does_not_begin_the_whole(tokenizer):
    template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"mem:1: the chat template writes message 5 in such a way that the prompt before it"):
        ConversationDataset(rows({"messages": TURNS}), tokenizer, max_tokens=200).conversation(0)


THINKS = (  # as in Qwen3: the last answer begins with an empty thought, which earlier ones lose
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_template_that_writes_the_last_answer_otherwise(tokenizer):
    tokenizer.chat_template = THINKS
    conversation = ConversationDataset(rows({"messages": TURNS}), tokenizer, max_tokens=200).conversation(0)
    assert parts(tokenizer, conversation)[1] == "c\n\nd<|im_end|><think></think>f<|im_end|>\n" + END
    assert tokenizer.decode(conversation.tokens) == tokenizer.apply_chat_template(TURNS, tokenize=False) + END


def test_answer_that_cannot_be_found(tokenizer):
    tokenizer.chat_template = THINKS.replace("| trim", "| upper")
    with pytest.raises(DataError, match="mem:1: where message 3 stands in the chat template's text cannot be told"):
        ConversationDataset(rows({"messages": TURNS}), tokenizer, max_tokens=200).conversation(0)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "hi", "completion": ""}, "mem:1: field 'completion': the completion is empty"),
        ({"prompt": "", "completion": "yo"}, "mem:1: the prompt is empty"),
        ({"prompt": "hi"}, "mem:1: no field 'completion'; the row has ['prompt']"),
        ({"completion": "hi"}, "mem:1: no field 'prompt'; the row has ['completion']"),
        ({"prompt": "hi", "completion": 4}, "mem:1: field 'completion': expected a string, got int"),
        ({"prompt": [user("hi")], "completion": 4}, "mem:1: field 'completion': expected a list of messages, got int"),
        ({"messages": [user("hi")]}, "mem:1: field 'messages': no message of the assistant's"),
        ({"messages": [assistant("yo")]}, "mem:1: field 'messages': the prompt is empty"),
        ({"messages": [user("hi"), assistant(" ")]}, "mem:1: field 'messages': the completion is empty"),
        ({"chosen": HH + " "}, "mem:1: field 'chosen': the completion is empty"),
        ({"conversations": "x"}, "mem:1: field 'conversations': expected a list of turns, got str"),
        ({"conversations": [{"from": "User"}]}, "mem:1: field 'conversations', turn 1: expected an object with 'from' and"),
        ({"conversations": [{"from": "User", "value": 1}]}, "mem:1: field 'conversations', turn 1, 'value': expected a string"),
        ({"conversations": [], "mask": "Assistant"}, "mem:1: field 'mask' is 'Assistant': only a loss on the assistant's"),
        ({"conversations": []}, "mem:1: field 'conversations': the list of messages is empty"),
    ],
)
def test_errors(tokenizer, row, message):
    with pytest.raises(DataError, match="^" + re.escape(message)):
        ConversationDataset(rows(row), tokenizer, max_tokens=100).conversation(0)


def test_overlong(tokenizer):
    data = rows(
        {"prompt": "123", "completion": "456"}, {"prompt": "1234", "completion": "567"}, {"prompt": "1" * 9, "completion": "2"}
    )
    skip, error, cut = (
        ConversationDataset(data, tokenizer, max_tokens=7, overlong=o) for o in ("skip", "error", "truncate")
    )  # the third token of the end of sequence counts
    assert parts(tokenizer, skip.conversation(0)) == ("123", "456" + END) and skip.conversation(1) is None
    with pytest.raises(TooLong, match="mem:2: the conversation has 8 tokens, more than max_tokens 7"):
        error.conversation(1)
    assert parts(tokenizer, cut.conversation(1)) == ("1234", "567")
    assert cut.take(2) is Skipped.OVERLONG


def test_stream_resumes(tokenizer):
    data = rows(*({"prompt": str(i), "completion": "1" * (i % 4 * 4)} for i in range(12)))
    dataset = ConversationDataset(data, tokenizer, max_tokens=10, invalid="skip")
    whole, first, second = (ConversationStream(dataset, 7) for _ in range(3))
    expected = whole.next(20)
    first.next(8)
    second.load_state_dict(first.state_dict())
    assert second.next(12) == expected[8:]
    assert second.state_dict() == whole.state_dict() and whole.skipped and whole.invalid


def test_gsm8k(tokenizer):
    data = open_rows(real("gsm8k"), limit=50)
    dataset = ConversationDataset(
        data, tokenizer, max_tokens=1000, prompt_template="Q: {question}\nA:", completion_template=" {answer}"
    )
    for i, row in enumerate(data):
        assert parts(tokenizer, dataset.conversation(i)) == (f"Q: {row['question']}\nA:", f" {row['answer']}{END}")
