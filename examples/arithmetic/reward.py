"""The checker of arithmetic in words: a reward for the trainer, `examples.arithmetic.reward:exact_answer`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

NUMBER = re.compile(r"(?:(?<!\d)-)?\d+")  # in "12-3" the minus is no sign


def exact_answer(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **_: Any) -> list[float]:
    """1.0 where the last number of the completion is the answer, else 0.0."""
    return [float(last_number(text) == last_number(str(right))) for text, right in zip(completions, answer, strict=True)]


def last_number(text: str) -> str | None:
    """Without leading zeros; None where there is none. A string, because a policy may write more digits than int takes."""
    found = NUMBER.findall(text)
    if not found:
        return None
    digits = found[-1].lstrip("-").lstrip("0") or "0"
    return "-" + digits if found[-1].startswith("-") and digits != "0" else digits
