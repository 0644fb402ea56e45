"""Multi-step arithmetic in words: data for SFT, a reward model, RL and a held-out test, made from a seed.

python examples/arithmetic/make_data.py --output build/arithmetic --train 4000 --held_out 200 --seed 0

sft.jsonl          {"prompt", "completion", "answer"}; with --careless, that share of the completions ends in a wrong answer
preferences.jsonl  {"prompt", "chosen", "rejected"}: the worked solution, and one that comes to a wrong answer
prompts.jsonl      {"prompt", "answer"}: what the policy is asked in RL
held_out.jsonl     {"prompt", "answer"}: no training file has a problem that begins with the same number and the
                   same first two steps, whatever its words
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

FILES = ("sft.jsonl", "preferences.jsonl", "prompts.jsonl", "held_out.jsonl")
LARGEST = 99
"""No intermediate result is larger, none is below 0."""

PEOPLE = {"tom": "he", "sam": "he", "ben": "he", "max": "he", "ann": "she", "mia": "she", "eva": "she", "sue": "she"}
THINGS = ("apples", "pens", "coins", "eggs", "cards", "nuts")
VERBS = {"+": ("buys {} more", "finds {} more", "gets {} more"), "-": ("gives away {}", "loses {}", "sells {}")}
QUESTIONS = ("how many {things} now?", "how many does {pronoun} have?", "how many {things} are left?")


class Step(NamedTuple):
    sign: str
    amount: int

    def of(self, value: int) -> int:
        return value + self.amount if self.sign == "+" else value - self.amount


@dataclass(frozen=True)
class Problem:
    """A number and what is added and taken away."""

    start: int
    steps: tuple[Step, ...]

    @property
    def values(self) -> list[int]:
        """The number, and the result of each step."""
        values = [self.start]
        for step in self.steps:
            values.append(step.of(values[-1]))
        return values

    @property
    def answer(self) -> int:
        return self.values[-1]

    @property
    def valid(self) -> bool:
        return all(0 <= value <= LARGEST for value in self.values)

    @property
    def key(self) -> Problem:
        """The number and the first two steps: what held-out problems share with none that is trained on."""
        return replace(self, steps=self.steps[:2])

    @property
    def solution(self) -> str:
        """As in " 7+5=12, 12-3=9. 9"."""
        return self.working + f". {self.answer}"

    @property
    def working(self) -> str:
        lines = [f"{value}{step.sign}{step.amount}={step.of(value)}" for value, step in zip(self.values, self.steps)]
        return " " + ", ".join(lines)

    def prompt(self, random: Random) -> str:
        """As in "tom has 7 apples. he buys 5 more, then loses 3. how many apples now?"."""
        name, things = random.choice(list(PEOPLE)), random.choice(THINGS)
        pronoun = PEOPLE[name]
        *first, last = [random.choice(VERBS[step.sign]).format(step.amount) for step in self.steps]
        question = random.choice(QUESTIONS).format(things=things, pronoun=pronoun)
        return f"{name} has {self.start} {things}. {pronoun} {', '.join(first)}, then {last}. {question}"


@dataclass(frozen=True)
class Difficulty:
    """Numbers start in 2..largest_start, a step adds or takes 1..largest_step, a problem has 2..most_steps."""

    largest_start: int = 40
    largest_step: int = 9
    most_steps: int = 3

    def draw(self, random: Random) -> Problem:
        while True:
            steps = tuple(
                Step(random.choice("+-"), random.randint(1, self.largest_step))
                for _ in range(random.randint(2, self.most_steps))
            )
            problem = Problem(random.randint(2, self.largest_start), steps)
            if problem.valid:
                return problem

    def keys(self) -> int:
        """How many beginnings there are."""
        every = [Step(sign, amount) for sign in "+-" for amount in range(1, self.largest_step + 1)]
        starts = range(2, self.largest_start + 1)
        return sum(Problem(start, (a, b)).valid for start in starts for a in every for b in every)


# Wrong solutions, as they are made by miscounting, misreading, skipping and careless writing.


def miscounted(problem: Problem, random: Random) -> str:
    """A step's result is off by a little, and what follows is computed from it."""
    wrong, at = random.choice((-10, -2, -1, 1, 2, 10)), random.randrange(len(problem.steps))
    lines, value = [], problem.start
    for i, step in enumerate(problem.steps):
        result = step.of(value) + (wrong if i == at else 0)
        lines.append(f"{value}{step.sign}{step.amount}={result}")
        value = result
    return " " + ", ".join(lines) + f". {value}"


def misread(problem: Problem, random: Random) -> str:
    """A step is added where it is taken away, or the other way round."""
    steps, at = list(problem.steps), random.randrange(len(problem.steps))
    steps[at] = Step("-" if steps[at].sign == "+" else "+", steps[at].amount)
    return replace(problem, steps=tuple(steps)).solution


def skipped(problem: Problem, random: Random) -> str:
    """A step is left out."""
    at = random.randrange(len(problem.steps))
    return replace(problem, steps=problem.steps[:at] + problem.steps[at + 1 :]).solution


def miscopied(problem: Problem, random: Random) -> str:
    """The working is right, the answer is another of its numbers."""
    return f"{problem.working}. {random.choice(problem.values[:-1])}"


def unworked(problem: Problem, random: Random) -> str:
    """An answer near the right one without working."""
    return f" {problem.answer + random.choice((-3, -2, -1, 1, 2, 3))}"


def unfinished(problem: Problem, random: Random) -> str:
    """The working stops before its last result."""
    return problem.working.rpartition("=")[0]


def careless(problem: Problem) -> str:
    """The working is right, the answer is the result before the last: the mistake that demonstrations have."""
    return f"{problem.working}. {problem.values[-2]}"


MISTAKES = (miscounted, miscounted, misread, skipped, miscopied, unworked, unfinished)


def rejected(problem: Problem, random: Random) -> str:
    """A wrong solution, with numbers in 0..99 like a right one's; its last number is not the answer."""
    while True:
        wrong = random.choice(MISTAKES)(problem, random)
        numbers = [int(n) for n in re.findall(r"(?:(?<!\d)-)?\d+", wrong)]
        if numbers[-1] != problem.answer and min(numbers) >= 0 and max(numbers) <= LARGEST:
            return wrong


def make(
    train: int, held_out: int, seed: int, difficulty: Difficulty = Difficulty(), careless_share: float = 0.0
) -> dict[str, list[dict[str, Any]]]:
    """The rows of each file, `train` in each of the three and `held_out` in the last; the same for the same arguments.

    careless_share: of the demonstrations in sft.jsonl, those that end in a wrong answer; so much is left for RL to mend.

    Raises:
        ValueError: more held-out problems than a quarter of the beginnings there are; numbers that make no problem.
    """
    for name, value in (("train", train), ("held_out", held_out), ("largest_start", difficulty.largest_start - 1)):
        if value < 1:
            raise ValueError(f"{name}: too few, got {value}")
    if not 0 <= careless_share <= 1:
        raise ValueError(f"careless_share: expected in [0, 1], got {careless_share}")
    if difficulty.largest_step < 1 or difficulty.most_steps < 2:
        raise ValueError(f"largest_step, most_steps: expected at least 1 and 2, got {difficulty}")
    if held_out > difficulty.keys() // 4:
        raise ValueError(f"held_out: expected at most {difficulty.keys() // 4} for these numbers, got {held_out}")

    random = Random(f"{seed} held_out.jsonl")
    kept: dict[Problem, Problem] = {}
    while len(kept) < held_out:
        problem = difficulty.draw(random)
        kept.setdefault(problem.key, problem)
    asked = [(p, p.prompt(random)) for p in kept.values()]

    def training(name: str, row: Callable[[Problem, str, Random], dict[str, Any]]) -> list[dict[str, Any]]:
        random = Random(f"{seed} {name}")
        return [row(p, p.prompt(random), random) for p in _others(difficulty, kept.keys(), random, train)]

    def shown(problem: Problem, random: Random) -> str:
        slips = random.random() < careless_share and problem.values[-2] != problem.answer
        return careless(problem) if slips else problem.solution

    return {
        "sft.jsonl": training(
            "sft.jsonl", lambda p, prompt, r: {"prompt": prompt, "completion": shown(p, r), "answer": p.answer}
        ),
        "preferences.jsonl": training(
            "preferences.jsonl", lambda p, prompt, r: {"prompt": prompt, "chosen": p.solution, "rejected": rejected(p, r)}
        ),
        "prompts.jsonl": training("prompts.jsonl", lambda p, prompt, _: {"prompt": prompt, "answer": p.answer}),
        "held_out.jsonl": [{"prompt": prompt, "answer": p.answer} for p, prompt in asked],
    }


def _others(difficulty: Difficulty, kept: Collection[Problem], random: Random, count: int) -> Iterator[Problem]:
    while count:
        problem = difficulty.draw(random)
        if problem.key not in kept:
            yield problem
            count -= 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the four files")
    parser.add_argument("--train", type=int, default=4000, help="rows of each training file")
    parser.add_argument("--held_out", type=int, default=200, help="rows of the held-out file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest_start", type=int, default=Difficulty.largest_start, help="largest first number")
    parser.add_argument("--largest_step", type=int, default=Difficulty.largest_step, help="largest number of a step")
    parser.add_argument("--most_steps", type=int, default=Difficulty.most_steps, help="steps of the longest problem")
    parser.add_argument("--careless", type=float, default=0.0, help="share of the demonstrations that end in a wrong answer")
    given = parser.parse_args(argv)
    difficulty = Difficulty(given.largest_start, given.largest_step, given.most_steps)
    try:
        files = make(given.train, given.held_out, given.seed, difficulty, given.careless)
    except ValueError as error:
        parser.error(str(error))
    given.output.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (given.output / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{given.output}: " + ", ".join(f"{name} {len(rows)}" for name, rows in files.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
