"""The bars of `fastrlhf verify` find what is wrong, at any number of tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fastrlhf.integrations.agreement import Disagreement, compare
from fastrlhf.integrations.hosts.inputs import inputs
from fastrlhf.integrations.seam import Call, Sizes
from fastrlhf.verification.cases import Case, Shapes, cases
from fastrlhf.verification.checking import check


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def found(op: str, shapes: Shapes = Shapes(64, 1024, 7), part: str = "") -> Case:
    return next(c for c in cases(shapes, torch.float32, "cpu") if c.op == op and part in c.input)


def changed(case: Case, change) -> Case:
    """Ours changed, the definition as it was."""

    def function(tensors, backend):
        out = case.function(tensors, backend)
        return out if backend == "reference" else change(out)

    return dataclasses.replace(case, function=function)


def with_gradients(case: Case, factor: float) -> Case:
    def function(tensors, backend):
        wrong = {n: Scaled.apply(t, factor) if n in case.grads and backend != "reference" else t for n, t in tensors.items()}
        return case.function(wrong, backend)

    return dataclasses.replace(case, function=function)


@pytest.mark.parametrize("factor", [0.0, 1 + 1e-4])
@pytest.mark.parametrize(("op", "part"), [("policy_loss", "ppo"), ("policy_loss", "gspo"), ("value_loss", "gaps")])
def test_a_wrong_gradient_is_found_however_many_tokens_share_the_mean(op, part, factor):
    case = found(op, part=part)
    assert check(case, None).passed
    result = check(with_gradients(case, factor), None)
    assert not result.passed and result.note.startswith("gradient of ")


def test_a_lost_gradient_is_named():
    result = check(changed(found("kl"), lambda out: out.detach()), None)
    assert not result.passed and result.note == "no gradient of a; no gradient of b"


def test_a_result_too_many_and_one_of_another_dtype_are_named():
    assert check(changed(found("logprobs"), lambda out: (*out, out[0])), None).note == "a result 3 too many"
    assert (
        check(changed(found("whiten"), lambda out: out.double()), None).note == "result: torch.float64, expected torch.float32"
    )
    assert "shape (1024, 64), expected (64, 1024)" in check(changed(found("whiten"), lambda out: out.t()), None).note


@pytest.mark.parametrize("shapes", [Shapes(1, 1, 1), Shapes(1, 1, 2), Shapes(2, 3, 50)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_false_alarm_at_the_smallest_shapes(shapes, dtype):
    failed = [r for r in (check(c, None) for c in cases(shapes, dtype, "cpu")) if not r.passed]
    assert not failed


def host(values, returns, mask):
    return 0.5 * ((values - returns) ** 2 * mask).sum() / mask.sum()


@pytest.mark.parametrize("factor", [0.0, 1 + 1e-4])
@pytest.mark.parametrize("rows", [3, 4096])
def test_a_seam_with_a_wrong_gradient_is_found(rows, factor):
    make = inputs(Sizes(rows, 128))
    call = Call("a mean", (make.batch(), make.batch(), make.mask()), grads=(0,))
    assert compare(host, host, call).error == 0
    with pytest.raises(Disagreement, match=r"result\[1\]\[0\]"):
        compare(host, lambda v, *rest: host(Scaled.apply(v, factor), *rest), call)


def test_small_results_are_compared_by_their_own_size():
    call = Call("small", (torch.full((3,), 1e-5),))
    with pytest.raises(Disagreement):
        compare(lambda x: x * 1.0, lambda x: x * 0, call)
