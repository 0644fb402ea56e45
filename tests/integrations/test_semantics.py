from __future__ import annotations

import math

import pytest
import torch
from fastrlhf.integrations.hosts import semantics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("other", [0.5, 1 + 2**-7, 1e-7, 2.0, -1.0, math.nan, math.inf])
def test_one_element_that_is_neither_0_nor_1_is_found(dtype, other):
    mask = (torch.rand(3, 70_001) < 0.5).to(dtype)
    assert semantics.zeros_and_ones(mask) and semantics.zeros_and_ones(mask[:, ::2])
    mask[1, 12_345] = other
    assert not semantics.zeros_and_ones(mask)


def test_all_zeros_all_ones_and_nothing_are_zeros_and_ones():
    assert all(semantics.zeros_and_ones(m) for m in (torch.zeros(5), torch.ones(2, 5), torch.ones(0)))
