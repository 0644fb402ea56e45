"""Configurations: what loads, what comes back, and every way of being refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from fastrlhf.config import REQUIRED, ConfigError, describe, load, option, section, to_dict, to_yaml
from fastrlhf.errors import UserError


@dataclass
class Optimizer:
    lr: float = option(1e-6, "Learning rate.", low=0)
    betas: list[float] = option([0.9, 0.95], "Decay of the moments.", low=0, high=1)
    clip: float | None = option(1.0, "Largest gradient norm.", above=0)
    name: str = option("adamw", "Which one.", choices=("adamw", "sgd"))


@dataclass
class Source:
    function: str = option(REQUIRED, "module:function.")
    weight: float = option(1.0, "Its share.")


@dataclass
class Reward:
    sources: list[Source] = option([], "What is added up.")
    scales: dict[str, float] = option({"length": 0.5}, "Factors by name.", low=0)


@dataclass
class Train:
    """A run."""

    model: str = option(REQUIRED, "Directory of the policy.")
    steps: int = option(10, "How many.", low=1)
    resume: Literal["auto", "never"] = option("auto", "Whether to go on.")
    packing: bool = option(False, "Several sequences in a row.")
    note: str | None = option(None, "Anything.")
    targets: list[str] = option([], "Names of layers.")
    sizes: list[int] = option([1, 2], "Sizes.")
    time_limit: float | Literal["none at all"] = option(1.5, "Hours.")
    optimizer: Optimizer = section(Optimizer, "Of the policy.")
    critic: Optimizer = section(Optimizer, "Of the critic.", lr=1e-5)
    reward: Reward = section(Reward, "What is good.")

    def __post_init__(self) -> None:
        if self.steps == 13:
            raise ValueError("steps: 13 brings bad luck")


@dataclass
class Inner:
    low: int = option(0, "Low.")
    high: int = option(1, "High.")

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low: expected at most high, {self.high}, got {self.low}")


@dataclass
class Outer:
    range: Inner = section(Inner, "Both.")


def of(*overrides: str, yaml: str | None = None, tmp_path: Path | None = None) -> Train:
    file = None
    if yaml is not None:
        assert tmp_path is not None
        file = tmp_path / "run.yaml"
        file.write_text(yaml)
    return load(Train, file, overrides)


def test_defaults_and_what_a_section_changes_of_them():
    config = of("--model", "m")
    assert (config.optimizer.lr, config.critic.lr, config.critic.betas) == (1e-6, 1e-5, [0.9, 0.95])
    assert config.reward.scales == {"length": 0.5}


def test_mutable_defaults_are_not_shared():
    of("--model", "m").sizes.append(3)
    of("--model", "m").critic.betas.append(3)
    assert of("--model", "m").sizes == [1, 2] and of("--model", "m").critic.betas == [0.9, 0.95]
    assert Train(model="m").sizes == [1, 2] and Train().model is REQUIRED


def test_the_command_line_wins_over_the_file(tmp_path):
    yaml = "model: a\noptimizer:\n  lr: 1e-5\n  betas: [0, 1]\n"
    config = of("--optimizer.lr", "3e-4", "--critic.lr=2", yaml=yaml, tmp_path=tmp_path)
    assert (config.optimizer.lr, config.optimizer.betas, config.critic.lr) == (3e-4, [0.0, 1.0], 2.0)
    assert of(yaml=yaml, tmp_path=tmp_path).optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        (["--steps", "1e3"], "steps", 1000),
        (["--steps=12345678901234567891"], "steps", 12345678901234567891),
        (["--packing"], "packing", True),
        (["--packing", "--steps", "2"], "packing", True),
        (["--packing", "false"], "packing", False),
        (["--note", "null"], "note", None),
        (["--note", "-x"], "note", "-x"),
        (["--note=--x=y"], "note", "--x=y"),
        (["--note", "1"], "note", "1"),
        (["--resume", "never"], "resume", "never"),
        (["--targets", "q,k, v"], "targets", ["q", "k", "v"]),
        (["--targets", "[q, k]"], "targets", ["q", "k"]),
        (["--targets", ""], "targets", []),
        (["--sizes", "3,4"], "sizes", [3, 4]),
        (["--optimizer.clip", "none"], "optimizer.clip", None),
        (["--optimizer", "{lr: 3, name: sgd}"], "optimizer.name", "sgd"),
        (["--time-limit", "none at all"], "time_limit", "none at all"),
        (["--time-limit", "2"], "time_limit", 2.0),
        (["--reward.scales.length", "2"], "reward.scales", {"length": 2.0}),
        (["--reward.scales.a-b.c", "3"], "reward.scales", {"length": 0.5, "a-b.c": 3.0}),
        (["--reward.scales", "{x: 1}"], "reward.scales", {"x": 1.0}),
        (["--reward.sources", "[{function: a}]", "--reward.sources.0.weight", "0.5"], "reward.sources", [Source("a", 0.5)]),
        (["--reward.sources.0.function", "a", "--reward.sources.1.function", "b"], "reward.sources", [Source("a"), Source("b")]),
    ],
)  # fmt: skip
def test_overrides(words, path, value):
    found = of("--model", "m", *words)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


REFUSED = [
    ([], "model: required, but not given; expected a string: Directory of the policy."),
    (["--modle", "m"], "modle: no such option; did you mean model? (command line)"),
    (["--lr", "1"], "lr: no such option; did you mean optimizer.lr? (command line)"),
    (["--optimiser.lr", "1"], "optimiser.lr: no such option; did you mean optimizer.lr? (command line)"),
    (["--zzzzzz", "1"], "zzzzzz: no such option (command line)"),
    (["--model.path", "1"], "model.path: no such option"),
    (["--steps", "0"], "steps: expected a number >= 1, got 0 (command line)"),
    (["--steps", "1.5"], "steps: expected an integer, got '1.5' (command line)"),
    (["--steps"], "steps: expected an integer, got no value (command line)"),
    (["--steps", "--packing"], "steps: expected an integer, got no value (command line)"),
    (["--packing", "perhaps"], "packing: expected true or false, got 'perhaps' (command line)"),
    (["--resume", "x"], "resume: expected one of 'auto', 'never', got 'x' (command line)"),
    (["--optimizer.name", "lion"], "optimizer.name: expected one of 'adamw', 'sgd', got 'lion' (command line)"),
    (["--optimizer.lr", "fast"], "optimizer.lr: expected a finite number, got 'fast' (command line)"),
    (["--optimizer.lr", "nan"], "optimizer.lr: expected a finite number, got 'nan' (command line)"),
    (["--optimizer.clip", "0"], "optimizer.clip: expected a number > 0, got 0.0 (command line)"),
    (["--optimizer.betas", "0,2"], "optimizer.betas.1: expected a number in [0, 1], got 2.0 (command line)"),
    (["--optimizer", "3"], "optimizer: expected a mapping with the options of Optimizer, got 3 (command line)"),
    (["--optimizer", "{lrr: 3}"], "optimizer.lrr: no such option; did you mean optimizer.lr? (command line)"),
    (["--targets", "[q"], "targets: expected a list, each element a string written as YAML, got '[q' (command line)"),
    (["--reward.scales.x", "-1"], "reward.scales.x: expected a number >= 0, got -1.0 (command line)"),
    (["--reward.sources.1.weight", "1"], "reward.sources.1: expected an index from 0 to 0, 0 adding one (command line)"),
    (["--reward.sources.0.weight", "1"], "reward.sources.0.function: required, but not given"),
    (["--reward.sources.0", "1"], "reward.sources.0: name one of its options, or give the whole list (command line)"),
    (["--reward.sources.0.wieght", "1"], "reward.sources.0.wieght: no such option; did you mean reward.sources.0.weight?"),
    (["--reward.sources", "[{function: a, wieght: 1}]"], "reward.sources.0.wieght: no such option; did you mean reward.sources.0.weight?"),
    (["--steps", "13"], "steps: 13 brings bad luck"),
    (["steps", "1"], "steps: expected an option, --name value (command line)"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[" ".join(w) or "nothing" for w, _ in REFUSED])
def test_refused_on_the_command_line(words, message):
    given = [] if not words or message.startswith("model:") else ["--model", "m"]
    with pytest.raises(ConfigError) as caught:
        of(*given, *words)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)


REFUSED_IN_FILES = [
    ("model: m\nstesp: 3", "stesp: no such option; did you mean steps? ({file})"),
    ("model: m\noptimizer: {learning: 3}", "optimizer.learning: no such option"),
    ("model: m\nsteps: three", "steps: expected an integer, got 'three' ({file})"),
    ("model: m\nsteps: true", "steps: expected an integer, got True ({file})"),
    ("model: m\nsteps: null", "steps: expected an integer, got None ({file})"),
    ("model: 3", "model: expected a string, got 3 ({file})"),
    ("model: m\npacking: 1", "packing: expected true or false, got 1 ({file})"),
    ("model: m\noptimizer: [1]", "optimizer: expected a mapping with the options of Optimizer, got [1] ({file})"),
    ("model: m\noptimizer: {betas: 1}", "optimizer.betas: expected a list, each element a finite number, got 1 ({file})"),
    ("model: m\noptimizer: {betas: [0, x]}", "optimizer.betas.1: expected a finite number, got 'x' ({file})"),
    ("model: m\nreward: {sources: [{weight: 1}]}", "reward.sources.0.function: required, but not given"),
    ("model: m\nreward: {sources: [{function: f, weight: w}]}", "reward.sources.0.weight: expected a finite number, got 'w' ({file})"),
    ("model: m\nreward: {sources: [3]}", "reward.sources.0: expected a mapping with the options of Source, got 3 ({file})"),
    ("model: m\nreward: {scales: {1: 2}}", "reward.scales: expected keys that are strings, got 1 ({file})"),
    ("model: m\nsteps: 3\nsteps: 4", "steps: given twice ({file}, line 3)"),
    ("on: 3", "True: expected a string as key, got True; quote it ({file})"),
    ("model: [", "{file}, line 1: not valid YAML"),
    ("- 1", "{file}: expected a mapping of options, got [1]"),
]  # fmt: skip


@pytest.mark.parametrize(("yaml", "message"), REFUSED_IN_FILES, ids=[y for y, _ in REFUSED_IN_FILES])
def test_refused_in_a_file(yaml, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        of(yaml=yaml, tmp_path=tmp_path)
    assert str(caught.value).startswith(message.replace("{file}", str(tmp_path / "run.yaml")))


def test_the_error_names_where_the_value_came_from(tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer.lr: .*run.yaml"):
        of("--critic.lr", "1", yaml="model: m\noptimizer: {lr: -1}", tmp_path=tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer.lr: .*command line"):
        of("--optimizer.lr", "-1", yaml="model: m\noptimizer: {lr: -2}", tmp_path=tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read: No such file"):
        load(Train, tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary: not UTF-8"):
        load(Train, tmp_path / "binary")
    (tmp_path / "empty").write_text("")
    assert load(Train, tmp_path / "empty", ["--model", "m"]).model == "m"


def test_hyphens_in_a_file(tmp_path):
    assert of(yaml="model: m\ntime-limit: 3", tmp_path=tmp_path).time_limit == 3.0
    with pytest.raises(ConfigError, match="time_limit: given twice, also as time-limit"):
        of(yaml="model: m\ntime-limit: 3\ntime_limit: 4", tmp_path=tmp_path)


def test_what_a_section_refuses_carries_its_path():
    with pytest.raises(ConfigError, match=r"^range.low: expected at most high, 1, got 2"):
        load(Outer, None, ["--range.low", "2"])


def test_round_trip(tmp_path):
    config = of(
        "--model", "yes", "--note", "null: [é\n#", "--optimizer.lr", "1e-300", "--optimizer.clip", "none", "--targets", "1,no,null",
        "--reward.sources", "[{function: 'a:b', weight: 0.1}]", "--reward.scales.1", "3", "--time-limit", "none at all",
    )  # fmt: skip
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load(Train, file) == config
    assert to_dict(load(Train, file)) == to_dict(config)
    assert to_dict(config)["reward"]["sources"] == [{"function": "a:b", "weight": 0.1}]
    assert list(to_dict(config))[:2] == ["model", "steps"]


def test_describe_names_everything():
    text = describe(Train)
    for line in (
        "options: A run.", "--model str  [required]", "--steps int >= 1  [10]", "--resume {auto,never}  [auto]", "--packing bool  [false]",
        "--note str|null  [null]", "--targets list of str  [empty]", "--sizes list of int  [1,2]", "optimizer: Of the policy.",
        "--optimizer.lr float >= 0  [1e-06]", "--critic.lr float >= 0  [1e-05]", "--optimizer.clip float|null > 0  [1]",
        "--optimizer.betas list of float in [0, 1]  [0.9,0.95]", "--optimizer.name {adamw,sgd}  [adamw]", "--reward.scales names to float",
        "--reward.sources.N.weight float  [1]", "Learning rate.", "Directory of the policy.",
    ):  # fmt: skip
        assert line in text, line
    assert text.index("options:") < text.index("optimizer:") < text.index("critic:") < text.index("reward.sources.N:")


def test_a_section_may_not_set_what_its_class_does_not_have():
    with pytest.raises(TypeError, match="Optimizer has no option 'lrr'"):
        section(Optimizer, "x", lrr=1)
