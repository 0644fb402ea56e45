"""Preference pairs: every form of a row, margins, sides that do not share a prompt, HH-RLHF itself."""

from __future__ import annotations

import re

import pytest
from fastrlhf.data import DataError, PreferenceDataset, PreferenceStream, PromptDataset, Skipped, TooLong, open_rows

from .conftest import real, rows

END = "<|endoftext|>"
HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ASKED, CHAT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", ("yo<|im_end|>\n" + END, "no<|im_end|>\n" + END)
FORMS = [
    ({"prompt": "hi", "chosen": " yo", "rejected": " no"}, "hi", (" yo" + END, " no" + END), None),
    ({"prompt": "hi", "chosen": "yo", "rejected": "no", "margin": 2}, "hi", ("yo" + END, "no" + END), 2.0),
    ({"prompt": [user("hi")], "chosen": "yo", "rejected": "no"}, ASKED, CHAT, None),
    ({"prompt": [user("hi")], "chosen": [assistant("yo")], "rejected": [assistant("no")]}, ASKED, CHAT, None),
    ({"prompt": [user("hi")], "chosen": assistant("yo"), "rejected": assistant("no")}, ASKED, CHAT, None),
    ({"chosen": [user("hi"), assistant("yo")], "rejected": [user("hi"), assistant("no")]}, ASKED, CHAT, None),
    ({"prompt": "hi", "chosen": [user("hi"), assistant("yo")], "rejected": [user("hi"), assistant("no")]}, ASKED, CHAT, None),
    ({"prompt": "hi", "chosen_response": "yo", "rejected_response": "no", "chosen_reward": 1.5, "rejected_reward": 1},
     "hi", ("yo" + END, "no" + END), 0.5),
    ({"prompt": [user("hi")], "chosen_response": assistant("yo"), "rejected_response": assistant("no")}, ASKED, CHAT, None),
    ({"chosen": HH + " yo", "rejected": HH + " no"}, HH, (" yo" + END, " no" + END), None),
]  # fmt: skip


@pytest.mark.parametrize("row, prompt, answers, margin", FORMS)
def test_forms(tokenizer, row, prompt, answers, margin):
    pair = PreferenceDataset(rows(row), tokenizer, max_tokens=100).preference(0)
    assert tokenizer.decode(pair.prompt) == prompt
    assert (tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected)) == answers
    assert pair.margin == margin and pair.index == 0
    assert all(side.count(tokenizer.eos_token_id) == 1 for side in (pair.chosen, pair.rejected))


@pytest.mark.parametrize("row, prompt, answers, margin", [form for form in FORMS if "chosen_reward" not in form[0]])
def test_the_prompt_is_that_of_reinforcement_learning(tokenizer, row, prompt, answers, margin):
    if isinstance(row.get("prompt"), str) and isinstance(row.get("chosen"), list):
        row = {"prompt": row["chosen"]}
        pair = PreferenceDataset(rows(FORMS[6][0]), tokenizer, max_tokens=100).preference(0)
    elif "prompt" not in row and isinstance(row["chosen"], list):
        pair = PreferenceDataset(rows(row), tokenizer, max_tokens=100).preference(0)
        row = {"prompt": row["chosen"]}
    else:
        pair = PreferenceDataset(rows(row), tokenizer, max_tokens=100).preference(0)
    assert PromptDataset(rows(row), tokenizer, max_tokens=100).prompt(0).tokens == pair.prompt


UNSHARED = [
    ({"chosen": HH + " yo", "rejected": HH.replace("b", "x") + " no"}, "chosen and rejected do not share a prompt: they differ at character 24, 'b"),
    ({"chosen": HH + " yo", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "chosen and rejected do not share a prompt"),
    ({"chosen": HH + " ", "rejected": HH + " no"}, "field 'chosen': the completion is empty"),
    ({"chosen": HH + " yo", "rejected": HH}, "field 'rejected': the completion is empty"),
    ({"prompt": "hi", "chosen": "yo", "rejected": " "}, "field 'rejected': the completion is empty"),
    ({"prompt": [user("hi")], "chosen": "yo", "rejected": [assistant("")]}, "field 'rejected': the completion is empty"),
    ({"prompt": " ", "chosen": "yo", "rejected": "no"}, "the prompt is empty"),
    ({"chosen": [user("hi"), assistant("yo")], "rejected": [user("ho"), assistant("no")]}, "chosen and rejected do not share the messages before the last"),
    ({"chosen": [assistant("yo")], "rejected": [assistant("no")], "prompt": []}, "field 'prompt': the list of messages is empty"),
]  # fmt: skip


@pytest.mark.parametrize("row, message", UNSHARED)
def test_pairs_that_are_none(tokenizer, row, message):
    data = rows({"prompt": "hi", "chosen": "yo", "rejected": "no"}, row)
    with pytest.raises(DataError, match="^mem:2: " + re.escape(message)):
        PreferenceDataset(data, tokenizer, max_tokens=100).preference(1)
    lenient = PreferenceDataset(data, tokenizer, max_tokens=100, invalid="skip")
    assert lenient.preference(1) is None and lenient.take(1) is Skipped.INVALID
    stream = PreferenceStream(lenient, 0, shuffle=False)
    assert [p.index for p in stream.next(3)] == [0, 0, 0] and stream.invalid == 2 and stream.skipped == 0


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "hi", "chosen": "yo"}, "no field 'rejected'"),
        ({"chosen": "yo", "rejected": "no"}, "field 'chosen': no turn '\\n\\nAssistant:' in 'yo'"),
        ({"prompt": "hi", "chosen": 1, "rejected": "no"}, "field 'chosen': expected a string, got int"),
        ({"prompt": [user("hi")], "chosen": [user("x")], "rejected": "no"}, "field 'chosen': the last message is of 'user'"),
        ({"prompt": "hi", "chosen": "yo", "rejected": "no", "margin": "2"}, "field 'margin': expected a number, got str"),
        (
            {"prompt": "hi", "chosen": "yo", "rejected": "no", "margin": float("nan")},
            "field 'margin': expected a finite number",
        ),
        ({"prompt": "hi", "chosen_response": "yo"}, "no field 'rejected_response'"),
    ],
)
@pytest.mark.parametrize("invalid", ["error", "skip"])
def test_errors(tokenizer, row, message, invalid):
    with pytest.raises(DataError, match="^mem:1: " + re.escape(message)):
        PreferenceDataset(rows(row), tokenizer, max_tokens=100, invalid=invalid).preference(0)


def test_other_fields(tokenizer):
    row = {"q": "hi", "chosen": "yo", "rejected": "no", "gap": -1.5}
    by_field = PreferenceDataset(rows(row), tokenizer, max_tokens=100, prompt_field="q", margin_field="gap").preference(0)
    assert by_field.margin == -1.5 and tokenizer.decode(by_field.prompt) == "hi"
    by_template = PreferenceDataset(rows(row), tokenizer, max_tokens=100, prompt_template="Q: {q}\nA:").preference(0)
    assert tokenizer.decode(by_template.prompt) == "Q: hi\nA:"


def test_overlong(tokenizer):
    data = rows(
        {"prompt": "12", "chosen": "345", "rejected": "6"},
        {"prompt": "12", "chosen": "3", "rejected": "4567"},
        {"prompt": "123456", "chosen": "1", "rejected": "2"},
    )
    skip, error, cut = (PreferenceDataset(data, tokenizer, max_tokens=6, overlong=o) for o in ("skip", "error", "truncate"))
    assert skip.preference(0) is not None and skip.take(1) is Skipped.OVERLONG
    with pytest.raises(TooLong, match="mem:2: the prompt with its longer completion has 7 tokens, more than max_tokens 6"):
        error.preference(1)
    pair = cut.preference(1)
    assert (tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected)) == ("3" + END, "4567")
    assert cut.take(2) is Skipped.OVERLONG


def test_hh_rlhf(tokenizer):
    """2312 pairs, of which 5 do not share their prompt and 4 have an empty completion."""
    data = open_rows(real("hh-rlhf/harmless-base-test.jsonl.gz"))
    with pytest.raises(DataError, match=r"harmless-base-test\.jsonl\.gz:\d+: "):
        PreferenceStream(PreferenceDataset(data, tokenizer, max_tokens=10**6), 0).next(len(data))
    stream = PreferenceStream(PreferenceDataset(data, tokenizer, max_tokens=10**6, invalid="skip"), 0)
    pairs = stream.next(2303)
    assert (stream.position, stream.invalid, stream.skipped) == (2312, 9, 0)
    for pair in pairs[::50]:
        row = data[pair.index]
        assert tokenizer.decode(pair.prompt + pair.chosen) == row["chosen"] + END
        assert tokenizer.decode(pair.prompt + pair.rejected) == row["rejected"] + END
        assert tokenizer.decode(pair.prompt).endswith("\n\nAssistant:")
