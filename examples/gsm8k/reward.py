"""The checker of GSM8K: a reward for the trainer, `examples.gsm8k.reward:exact_answer`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

MARK = "####"
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d+(?:\.\d+)?|\.\d+)")  # in "12-3" the minus is no sign


def exact_answer(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float]:
    """1.0 where a completion states the number of GSM8K's `answer`, else 0.0.

    What a text states is the number after its first "####", else its last number; "$1,080.00" is 1080. A completion
    with nothing after the mark states nothing.

    Raises:
        ValueError: an answer without a number; names it.
    """
    rewards = []
    for text, solution in zip(completions, answer, strict=True):
        right = stated(str(solution))
        if right is None:
            raise ValueError(f"answer: expected a number, after {MARK} or as the last of the text, got {solution!r:.80}")
        rewards.append(float(stated(text) == right))
    return rewards


def stated(text: str) -> Decimal | None:
    """The number that a solution states as its answer."""
    before, mark, after = text.partition(MARK)
    numbers = NUMBER.findall(THOUSANDS.sub("", (after if mark else before).replace("$", "")))
    if not numbers:
        return None
    return Decimal(numbers[0] if mark else numbers[-1])
