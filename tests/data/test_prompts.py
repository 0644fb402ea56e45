"""Prompts: every form of a row, what is too long, the stream and its state."""

from __future__ import annotations

import re

import pytest
from fastrlhf.data import DataError, PromptDataset, PromptStream, Skipped, TooLong, open_rows

from .conftest import real, rows

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


@pytest.mark.parametrize(
    "row, options, text",
    [
        ({"prompt": "hi 12"}, {}, "hi 12"),
        ({"question": "hi", "answer": "x"}, {"prompt_field": "question"}, "hi"),
        ({"question": "hi", "n": 2}, {"template": "Q: {question} {n}\nA:"}, "Q: hi 2\nA:"),
        ({"prompt": [USER]}, {}, ASKED),
        ({"messages": [USER]}, {}, ASKED),
        ({"messages": [USER, ASSISTANT]}, {}, ASKED),
        ({"prompt": None, "messages": [USER]}, {}, ASKED),
        ({"mask": "User", "system": "", "conversations": [{"from": "User", "value": "hi"}]}, {}, ASKED),
        ({"input": "hi", "output": "yo"}, {}, "hi"),
        ({"chosen": HH + " d", "rejected": HH + " e"}, {}, HH),
    ],
)
def test_forms(tokenizer, row, options, text):
    dataset = PromptDataset(rows({"prompt": "first", **row}, row), tokenizer, max_tokens=100, **options)
    prompt = dataset.prompt(1)
    assert prompt.text == text and tokenizer.decode(prompt.tokens) == text
    assert prompt.index == 1 and dict(prompt.row) == row and prompt.row.where == "mem:2"


@pytest.mark.parametrize(
    "line, options, message",
    [
        ({"prompt": ""}, {}, "t.jsonl:3: the prompt is empty"),
        ({"prompt": " \n"}, {}, "t.jsonl:3: the prompt is empty"),
        ({"prompt": 5}, {}, "t.jsonl:3: field 'prompt': expected a string, got int"),
        ({"prompt": None}, {}, "t.jsonl:3: field 'prompt' is null"),
        ({"question": "hi"}, {}, "t.jsonl:3: no field 'prompt'; the row has ['question']"),
        ({"prompt": "hi"}, {"template": "{question}"}, "t.jsonl:3: no field 'question'; the row has ['prompt']"),
        ({"question": " "}, {"template": "Q: {question}"}, "t.jsonl:3: template: question empty"),
        ('{"prompt": "hi"', {}, "t.jsonl:3: not JSON: "),
    ],
)
def test_errors_name_file_and_line(tokenizer, write, line, options, message):
    dataset = PromptDataset(open_rows(write("t.jsonl", [{"a": 1}, "", line])), tokenizer, max_tokens=9, **options)
    with pytest.raises(DataError, match="^" + re.escape(message)):
        dataset.prompt(1)


def test_invalid_skip_is_for_empty_ones_only(tokenizer):
    dataset = PromptDataset(rows({"prompt": " "}, {"x": 1}), tokenizer, max_tokens=9, invalid="skip")
    assert dataset.prompt(0) is None and dataset.take(0) is Skipped.INVALID
    with pytest.raises(DataError, match="no field 'prompt'"):
        dataset.prompt(1)


def test_overlong(tokenizer):
    data = rows({"prompt": "1234567"}, {"prompt": "12345678"})
    kept = {o: PromptDataset(data, tokenizer, max_tokens=7, overlong=o) for o in ("skip", "error", "truncate_left")}
    assert all(tokenizer.decode(d.prompt(0).tokens) == "1234567" for d in kept.values())
    assert kept["skip"].prompt(1) is None and kept["skip"].take(1) is Skipped.OVERLONG
    with pytest.raises(TooLong, match="mem:2: the prompt has 8 tokens, more than max_tokens 7"):
        kept["error"].prompt(1)
    cut = kept["truncate_left"].prompt(1)
    assert tokenizer.decode(cut.tokens) == "2345678" and cut.text == "12345678"


def test_truncating_keeps_the_beginning_of_sequence(tokenizer):
    tokenizer.bos_token = "<|im_start|>"
    data = rows({"prompt": "<|im_start|>12345678"})
    assert (
        tokenizer.decode(PromptDataset(data, tokenizer, max_tokens=4, overlong="truncate_left")[0].tokens) == "<|im_start|>678"
    )
    assert PromptDataset(data, tokenizer, max_tokens=1, overlong="truncate_left")[0].tokens == [tokenizer.bos_token_id]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
        ({"overlong": "cut"}, r"overlong: expected one of \('skip', 'error', 'truncate_left'\), got 'cut'"),
        ({"invalid": "ignore"}, "invalid: expected one of"),
        ({"template": "none"}, "template: names no field"),
    ],
)
def test_options(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        PromptDataset(rows({"prompt": "a"}), tokenizer, **{"max_tokens": 9, **options})


def test_tokenizer_without_end(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with an end-of-sequence token"):
        PromptDataset(rows({"prompt": "a"}), tokenizer, max_tokens=9)


def test_index(tokenizer):
    dataset = PromptDataset(rows({"prompt": "a"}, {"prompt": "b"}), tokenizer, max_tokens=9)
    assert len(dataset) == 2 and dataset.prompt(-1).index == 1 and dataset[-1].text == "b"
    with pytest.raises(IndexError, match="mem: row 2 of 2"):
        dataset.prompt(2)


@pytest.fixture
def some(tokenizer):
    """Ten prompts; numbers 3 and 7 are too long, 5 is empty."""
    data = rows(*({"prompt": "9" * (20 if i in (3, 7) else 0 if i == 5 else i % 3 + 1)} for i in range(10)))
    return PromptDataset(data, tokenizer, max_tokens=9, invalid="skip")


def test_stream_takes_until_n_are_kept(some):
    stream = PromptStream(some, seed=0, shuffle=False)
    assert [p.index for p in stream.next(3)] == [0, 1, 2] and (stream.position, stream.skipped) == (3, 0)
    assert [p.index for p in stream.next(3)] == [4, 6, 8] and (stream.position, stream.skipped, stream.invalid) == (9, 2, 1)
    assert [p.index for p in stream.next(2)] == [9, 0] and stream.epoch == 1


def test_stream_epoch_is_shuffled_and_whole(some):
    stream = PromptStream(some, seed=4)
    epochs = [[p.index for p in stream.next(7)] for _ in range(2)]
    assert sorted(epochs[0]) == [0, 1, 2, 4, 6, 8, 9] and epochs[0] != sorted(epochs[0])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("at", [0, 1, 5, 7, 16])
def test_resume_equals_never_stopped(some, at):
    whole, first, second = (PromptStream(some, seed=4) for _ in range(3))
    expected = [p.index for p in whole.next(30)]
    first.next(at)
    second.load_state_dict(first.state_dict())
    assert [p.index for p in second.next(30 - at)] == expected[at:]
    assert second.state_dict() == whole.state_dict() and whole.skipped > 4


def test_state_of_another_stream_is_refused(some):
    stream = PromptStream(some, seed=4)
    stream.next(9)
    state = stream.state_dict()
    for change, message in (
        ({"seed": 1}, "saved with seed 1"),
        ({"length": 3}, "saved with length 3"),
        ({"skipped": None}, "skipped"),
    ):
        with pytest.raises(ValueError, match=message):
            stream.load_state_dict({**state, **change})
    assert stream.state_dict() == state


def test_error_takes_nothing(tokenizer):
    stream = PromptStream(
        PromptDataset(rows({"prompt": "a"}, {"prompt": "b" * 50}, {"x": 1}), tokenizer, max_tokens=9), 0, False
    )
    stream.next(1)
    with pytest.raises(DataError, match="mem:3"):
        stream.next(1)
    assert (stream.position, stream.skipped) == (1, 0)


@pytest.mark.parametrize("begin", [0, 2])
def test_epoch_without_a_prompt(tokenizer, begin):
    data = rows(*({"prompt": "1" * 9} for _ in range(3)))
    stream = PromptStream(PromptDataset(data, tokenizer, max_tokens=4), seed=0)
    stream.load_state_dict({**stream.state_dict(), "position": begin})
    message = "mem: no example in a whole epoch of 3 rows: so far 6 longer than max_tokens 4, 0 invalid"
    with pytest.raises(DataError, match=message):
        stream.next(1)


@pytest.mark.parametrize("seed", range(30))
def test_one_good_row_is_found_wherever_the_stream_stands(tokenizer, seed):
    data = rows(*({"prompt": "1" * (1 if i == 4 else 9)} for i in range(6)))
    stream = PromptStream(PromptDataset(data, tokenizer, max_tokens=4), seed)
    assert [p.index for p in stream.next(10)] == [4] * 10


def test_shards(some):
    shards = [PromptStream(some, 4).shard(rank, 2) for rank in range(2)]
    taken = [[p.index for p in shard.next(3)] for shard in shards]
    whole = [i for p in PromptStream(some, 4).next(7) for i in [p.index]]
    assert not set(taken[0]) & set(taken[1]) and set(taken[0]) | set(taken[1]) <= set(whole)
    again = PromptStream(some, 4).shard(1, 2)
    again.load_state_dict(shards[1].state_dict())
    assert [p.index for p in again.next(5)] == [p.index for p in shards[1].next(5)]


def test_gsm8k(tokenizer):
    dataset = PromptDataset(
        open_rows(real("gsm8k"), limit=300), tokenizer, max_tokens=150, template="Question: {question}\nAnswer:"
    )
    stream = PromptStream(dataset, 0)
    prompts = stream.next(100)
    assert all(p.text == f"Question: {p.row['question']}\nAnswer:" and len(p.tokens) <= 150 for p in prompts)
    assert stream.position == 100 + stream.skipped and stream.skipped > 0
