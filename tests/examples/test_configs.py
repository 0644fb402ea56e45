"""Every config under examples/ loads: no key that does not exist, no value out of its bounds. Nothing is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastrlhf.cli import arguments, chain, init, train
from fastrlhf.config import ConfigError, load
from fastrlhf.training.rewards import load_function

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples").glob("**/*.yaml"))
NAMES = [str(file.relative_to(ROOT / "examples")) for file in FILES]
REQUIRED = {"train": ("run.directory", "model.path", "data.path"), "init": ("output", "data", "fields")}


def given(tree: Any, path: str) -> bool:
    for part in path.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def load_file(file: Path) -> Any:
    """A config by its name: ppo.yaml is of `train ppo`, model.yaml of `init`. What it leaves to the command line is filled."""
    cls, kind = (init.InitOptions, "init") if file.stem == "model" else (train.classes(file.stem)[0], "train")
    tree = yaml.safe_load(file.read_text())
    fill = [word for path in REQUIRED[kind] if not given(tree, path) for word in (f"--{path}", "x")]
    return load(cls, file, fill)


def load_stage(stage: chain.Stage) -> Any:
    """What a stage of a chain would run with."""
    command, *words = stage.command
    if command == "train":
        return train.configure(words[0], words[1:])
    assert command == "init", f"{stage.name}: this test does not know fastrlhf {command}"
    return arguments.arguments("init", init.InitOptions, words)


def test_there_are_configs() -> None:
    assert {"arithmetic/chain.yaml", "gsm8k/chain.yaml", "gsm8k/grpo.yaml", "7b/ppo.yaml"} <= set(NAMES)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_it_loads(file: Path) -> None:
    if file.stem != "chain":
        load_file(file)
        return
    variables, stages = chain.read(file, [])
    assert {"directory", "seed"} <= set(variables)
    configs = {stage.name: load_stage(stage) for stage in stages if not stage.shell}
    for stage in stages:  # what is passed over must be what the stage makes
        assert stage.creates is None or stage.creates.startswith(variables["directory"])
    for name, config in configs.items():
        for source in getattr(config, "rewards", []):
            assert (source.function is None) != (source.model is None), name
            if source.function is not None:
                assert callable(load_function(source.function))


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "ppo.yaml"
    wrong.write_text("kl: {coeff: 0.1}\n")
    with pytest.raises(ConfigError, match=r"kl\.coeff: no such option; did you mean kl\.coef\?"):
        load_file(wrong)
    file = tmp_path / "chain.yaml"
    file.write_text("stages: [{fastrlhf: train sft, options: {run.directory: x, model.path: x, data.path: x, batchsize: 3}}]\n")
    (stage,) = chain.read(file, [])[1]
    with pytest.raises(ConfigError, match="batchsize: no such option"):
        load_stage(stage)
