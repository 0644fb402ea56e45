"""Rewards from functions and models, weighted; what is no reward is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastrlhf.config import ConfigError
from fastrlhf.data import Prompt, Rows
from fastrlhf.models import load_scalar_model, save_scalar_model
from fastrlhf.training.rewards import RewardError, Rewards, RewardSource, load_function

pytest.importorskip("safetensors")
ROWS = Rows.from_list([{"prompt": "a b", "answer": "x", "id": 1}, {"prompt": "c", "answer": "y", "id": 2}])
PROMPTS = [Prompt([1, 2], "a b", ROWS[0], 0), Prompt([3], "c", ROWS[1], 1)]
TOKENS, TEXTS = [[1, 2, 5], [3, 6, 7]], ["one", "three"]


def right(prompts: list[str], completions: list[str], answer: list[str], id: list[int], **_: Any) -> list[float]:
    assert prompts == ["a b", "c"] and completions == TEXTS
    return [i + 0.5 * (a == "x") for i, a in zip(id, answer, strict=True)]


def bad(value: Any) -> Callable[..., Any]:
    return lambda **_: [1.0, value] if not isinstance(value, list) else value


def rewards(*sources: RewardSource, vocab: int = 264) -> Rewards:
    return Rewards(list(sources), max_tokens=100, vocab_size=vocab, device=torch.device("cpu"), dtype=torch.float32)


def named(**sources: Any) -> Rewards:
    """Rewards of functions given as they are."""
    made = rewards(*(RewardSource(name=n, function="tests.training.test_rewards:right") for n in sources))
    made.functions = dict(sources)
    return made


def test_a_function_gets_the_rows_fields_and_sources_add_up() -> None:
    here = "tests.training.test_rewards:right"
    got = rewards(RewardSource("a", here, weight=2.0), RewardSource("b", here, weight=-1.0))(PROMPTS, TOKENS, TEXTS)
    assert got.parts["a"].tolist() == [1.5, 2.0] == got.total.tolist()


def test_a_function_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def length(prompts, completions, **_):\n    return [len(c) for c in completions]\n")
    got = rewards(RewardSource(function=f"{file}:length"))(PROMPTS, TOKENS, TEXTS)
    assert got.parts["length"].tolist() == [3.0, 5.0]


def test_a_reward_model_scores_the_last_token_standardised(model_dir: str, tmp_path: Path) -> None:
    model = load_scalar_model(model_dir, seed=4)
    model.mean, model.std = 0.25, 0.5
    save_scalar_model(model, tmp_path)
    vocab = model.decoder.config.vocab_size
    got = rewards(RewardSource(model=str(tmp_path), weight=3.0), vocab=vocab)(PROMPTS, TOKENS, TEXTS)
    from fastrlhf.models import Packed

    for i in range(2):
        ids, pack = Packed.of([TOKENS[i]])
        with torch.no_grad():
            assert float(got.parts["model"][i]) == pytest.approx((float(model(ids, pack)[-1]) - 0.25) / 0.5, abs=1e-5)
    torch.testing.assert_close(got.total, 3 * got.parts["model"])
    with pytest.raises(ConfigError, match=r"is a language model: it has no score\.weight"):
        rewards(RewardSource(model=model_dir), vocab=vocab)
    with pytest.raises(ConfigError, match=rf"rewards\.0\.model: .* has a vocabulary of {vocab}, the policy of 8"):
        rewards(RewardSource(model=str(tmp_path)), vocab=8)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "reward 'f': got nan for completion 1, 'three' of prompt 'c'"),
        (math.inf, "got inf for completion 1"),
        ([1.0], "expected 2 rewards, one for each completion, got 1"),
        ("x", "the function raised ValueError: could not convert string to float"),
        (None, "the function raised TypeError"),
    ],
)
def test_what_is_no_reward_is_named(value: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        named(f=bad(value))(PROMPTS, TOKENS, TEXTS)


def test_a_function_that_raises_is_named_with_its_error() -> None:
    def broken(**_: Any) -> list[float]:
        raise KeyError("answer")

    with pytest.raises(RewardError, match="reward 'f': the function raised KeyError: 'answer'") as caught:
        named(f=broken)(PROMPTS, TOKENS, TEXTS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_sources_that_cannot_be_are_refused(tmp_path: Path) -> None:
    right_name = "tests.training.test_rewards:right"
    for sources, message in (
        ([], "rewards: expected one source or more"),
        ([RewardSource()], r"rewards\.0: expected either function or model, got neither"),
        ([RewardSource(function=right_name, model="x")], r"rewards\.0: expected either function or model, got both"),
        ([RewardSource(function=right_name)] * 2, r"rewards\.1\.name: 'right' is the name of another source"),
    ):
        with pytest.raises(ConfigError, match=message):
            rewards(*sources)
    for name, message in (
        ("nothing", "expected module:function, got 'nothing'"),
        ("no.such.module:f", "no.such.module could not be imported: ModuleNotFoundError"),
        ("tests.training.test_rewards:absent", "has no function 'absent'"),
        (f"{tmp_path}/none.py:f", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_function(name)
