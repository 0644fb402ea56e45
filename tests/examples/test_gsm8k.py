"""GSM8K's checker, on written cases and on every real row where the data is at hand."""

from __future__ import annotations

from decimal import Decimal

import pytest
from fastrlhf.data import open_rows

from examples.gsm8k.reward import exact_answer, stated
from tests.data.conftest import cache, real  # noqa: F401  # the index of a file goes to the test's own cache


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = <<3+4=7>>7 left.\n#### 7", "7"),
        ("#### 7 dollars, that is 700 cents", "7"),
        ("first 5\n#### 7\n#### 9", "7"),
        ("the answer is 1,080", "1080"),
        ("it costs $1,080.00.", "1080"),
        ("1,234,567", "1234567"),
        ("of 1,2 and 3,45", "45"),
        ("#### -12", "-12"),
        ("#### $-12", "-12"),
        ("#### -$12", "-12"),
        ("30-12", "12"),
        ("a share of .5", "0.5"),
        ("10.", "10"),
        ("50%", "50"),
        ("12 ####", None),
        ("none", None),
        ("", None),
    ],
)
def test_stated(text, number):
    assert stated(text) == (None if number is None else Decimal(number))


def test_reward():
    answer = ["4 * 3 = <<4*3=12>>12\n#### 12"] * 5
    completions = ["so 12\n#### 12", "it is 12.0", "#### 13 not 12", "12, no, 13", ""]
    assert exact_answer(["?"] * 5, completions, answer=answer, question=["?"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert exact_answer(["?"], ["1080"], ["#### 1,080"]) == [1.0]
    assert exact_answer(["?"], ["72"], [72]) == [1.0]


def test_refused():
    with pytest.raises(ValueError, match=r"answer: expected a number.*'none'"):
        exact_answer(["?"], ["7"], ["none"])
    with pytest.raises(ValueError):
        exact_answer(["?"], ["7"], ["#### 7", "#### 8"])


def test_real_rows():
    rows = list(open_rows(real("gsm8k/test.jsonl")))
    questions, answers = [row["question"] for row in rows], [row["answer"] for row in rows]
    assert exact_answer(questions, answers, answer=answers) == [1.0] * len(rows)
    bare = [answer.rpartition("####")[2].strip() for answer in answers]
    assert exact_answer(questions, [f"The answer is ${b}." for b in bare], answer=answers) == [1.0] * len(rows)
    assert exact_answer(questions, [f"#### {b}1" for b in bare], answer=answers) == [0.0] * len(rows)
    shifted = answers[1:] + answers[:1]
    assert sum(exact_answer(questions, shifted, answer=answers)) < 0.1 * len(rows)
