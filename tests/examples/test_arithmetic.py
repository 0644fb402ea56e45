"""Arithmetic in words: every solution is right, every rejected one wrong, and nothing held out is trained on."""

from __future__ import annotations

import json
import re
from random import Random

import pytest

from examples.arithmetic import make_data
from examples.arithmetic.make_data import FILES, MISTAKES, Difficulty, Problem, Step, make
from examples.arithmetic.reward import exact_answer, last_number

TRAIN, HELD_OUT = 1500, 300


@pytest.fixture(scope="module")
def files():
    return make(TRAIN, HELD_OUT, seed=3)


def read(prompt: str) -> Problem:
    """A problem from its words alone, by other means than it was written."""
    signs = {"buys": "+", "finds": "+", "gets": "+", "gives": "-", "loses": "-", "sells": "-"}
    start = int(re.search(r"has (\d+)", prompt)[1])
    steps = re.findall(r"(buys|finds|gets|gives|loses|sells) (?:away )?(\d+)", prompt)
    return Problem(start, tuple(Step(signs[verb], int(amount)) for verb, amount in steps))


def test_the_form_that_is_documented():
    problem = Problem(7, (Step("+", 5), Step("-", 3)))
    assert problem.solution == " 7+5=12, 12-3=9. 9" and problem.answer == 9
    assert re.fullmatch(r"\w+ has 7 \w+\. (he|she) \w+ 5 more, then [\w ]+ 3\. how many [\w ]+\?", problem.prompt(Random(0)))


def test_sizes_and_fields(files):
    assert {name: len(rows) for name, rows in files.items()} == dict(zip(FILES, (TRAIN, TRAIN, TRAIN, HELD_OUT)))
    fields = {name: {tuple(row) for row in rows} for name, rows in files.items()}
    assert fields == {
        "sft.jsonl": {("prompt", "completion", "answer")},
        "preferences.jsonl": {("prompt", "chosen", "rejected")},
        "prompts.jsonl": {("prompt", "answer")},
        "held_out.jsonl": {("prompt", "answer")},
    }


def test_the_words_say_what_is_computed(files):
    for row in files["sft.jsonl"]:
        problem = read(row["prompt"])
        assert problem.solution == row["completion"] and problem.answer == row["answer"]
        lines = re.findall(r"(\d+)([+-])(\d+)=(\d+)", row["completion"])
        assert len(lines) == len(problem.steps) in (2, 3)
        for a, sign, b, c in lines:
            assert int(c) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) and 0 <= int(c) <= 99
    for name in ("prompts.jsonl", "held_out.jsonl"):
        assert all(read(row["prompt"]).answer == row["answer"] for row in files[name])


def test_short_texts_of_few_words(files):
    rows = [row for rows in files.values() for row in rows]
    texts = [row["prompt"] for row in rows]
    texts += [row[field] for row in rows for field in ("completion", "chosen", "rejected") if field in row]
    assert max(len(row["prompt"]) for row in rows) <= 110
    assert max(len(text) for row in rows for field in ("completion", "chosen", "rejected") if (text := row.get(field))) <= 35
    words = set(re.findall(r"[a-z]+", " ".join(texts)))
    assert len(words) < 50 and not any(c.isupper() for text in texts for c in text)


@pytest.mark.parametrize("difficulty", [Difficulty(), Difficulty(12, 4, 2)])
def test_held_out_problems_are_in_no_training_file(difficulty):
    files = make(TRAIN, 50, 0, difficulty)
    key = lambda row: (read(row["prompt"]).start, read(row["prompt"]).steps[:2])  # noqa: E731
    held_out = {key(row) for row in files["held_out.jsonl"]}
    assert len(held_out) == 50
    for name in FILES[:3]:
        trained = {key(row) for row in files[name]}
        assert trained and not trained & held_out, name
    # rows drawn without holding any out would meet them
    random = Random(1)
    assert {(p.start, p.steps[:2]) for p in (difficulty.draw(random) for _ in range(TRAIN))} & held_out


def test_chosen_is_right_and_rejected_wrong(files):
    rows = files["preferences.jsonl"]
    prompts, answers = [row["prompt"] for row in rows], [read(row["prompt"]).answer for row in rows]
    assert set(exact_answer(prompts, [row["chosen"] for row in rows], answer=answers)) == {1.0}
    assert set(exact_answer(prompts, [row["rejected"] for row in rows], answer=answers)) == {0.0}
    form = re.compile(r"( \d+[+-]\d+=\d+,?)+\. \d+")
    formed = sum(form.fullmatch(row["rejected"]) is not None for row in rows) / len(rows)
    assert 0.5 < formed < 0.95  # most look like a solution, some do not
    assert all(form.fullmatch(row["chosen"]) for row in rows)


@pytest.mark.parametrize("mistake", sorted(set(MISTAKES), key=lambda m: m.__name__))
def test_every_mistake_differs_from_the_solution(mistake):
    random = Random(0)
    problems = [Difficulty().draw(random) for _ in range(50)]
    assert all(mistake(p, random) != p.solution for p in problems)


def test_same_seed_same_rows_other_seed_others():
    assert make(20, 10, 0) == make(20, 10, 0)
    for a, b in zip(make(20, 10, 0).values(), make(20, 10, 1).values()):
        assert a != b


def test_script_writes_what_make_returns(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "a"), "--train", "7", "--held_out", "5", "--seed", "2", "--largest_step", "5"]
    assert make_data.main(arguments) == 0
    files = {p.name: [json.loads(line) for line in p.read_text().splitlines()] for p in (tmp_path / "a").iterdir()}
    assert files == make(7, 5, 2, Difficulty(largest_step=5))
    assert "sft.jsonl 7" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        make_data.main(["--output", str(tmp_path / "b"), "--held_out", "100000"])
    assert "held_out: expected at most" in capsys.readouterr().err and not (tmp_path / "b").exists()


@pytest.mark.parametrize("arguments", [(0, 5), (5, 0)])
def test_numbers_that_make_no_data(arguments):
    with pytest.raises(ValueError, match="too few, got 0"):
        make(*arguments, 0)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (" 7+5=12, 12-3=9. 9", 9, 1.0),
        (" 7+5=12, 12-3=9. 9", "9", 1.0),
        (" 7+5=12, 12-3=9. 12", 9, 0.0),
        (" 9, or 7", 9, 0.0),  # the last counts
        ("9", 9, 1.0),
        ("09", 9, 1.0),
        ("19", 9, 0.0),
        ("90", 9, 0.0),
        (" -9", 9, 0.0),
        ("=-9", 9, 0.0),
        (" 12-9", 9, 1.0),
        ("0", 0, 1.0),
        ("-0", 0, 1.0),
        ("", 0, 0.0),
        ("no number", 0, 0.0),
        ("9" * 5000, 9, 0.0),
    ],
)
def test_reward(completion, answer, reward):
    assert exact_answer(["?"], [completion], answer=[answer], other=["field"]) == [reward]


def test_rewards_come_in_order_and_one_for_each():
    assert exact_answer(["?"] * 3, ["1", "2", "3"], [1, 0, 3]) == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError):
        exact_answer(["?"] * 3, ["1", "2", "3"], [1, 0])
    assert last_number("007 and -08") == "-8"
