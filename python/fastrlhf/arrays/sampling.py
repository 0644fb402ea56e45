"""Sampling of tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from .native import address, extension, integer, matrix, number
from .view import FLOATS, give_back, view


class Sample(NamedTuple):
    """`tokens` int64 (...), `logprobs` float32 (...)."""

    tokens: Any
    logprobs: Any


def sample(
    logits: Any, *, seed: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Sample:
    """`fastrlhf.sample` of logits (..., V) with one seed and one of each option for all rows; no kept sets."""
    x = view("logits", logits, FLOATS)
    cut, lead, vocab = matrix("logits", x), x.shape[:-1], x.shape[-1]
    if not number("top_p", top_p, 0.0, 1.0) > 0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    scalars = (
        number("temperature", temperature, 0.0, math.nextafter(math.inf, 0)), integer("top_k", top_k, 0), float(top_p),
        number("min_p", min_p, 0.0, 1.0), integer("seed", seed),
    )  # fmt: skip
    native, lane = extension("sample", x)
    tokens, logprobs = np.empty(lead, np.int64), np.empty(lead, np.float32)
    native.sample(cut, x.size // vocab, vocab, scalars, (0, 0, 0, 0, 0), tokens.ctypes.data, address(logprobs), 0, 0, lane)
    return Sample(give_back(logits, tokens), give_back(logits, logprobs))
