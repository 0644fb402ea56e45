"""Stages in order, variables filled in, what exists passed over, what fails named."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastrlhf.cli.chain import read
from fastrlhf.cli.main import main
from fastrlhf.errors import ConfigError

pytest.importorskip("yaml")


def chain(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "chain.yaml"
    path.write_text(text)
    return path


def test_stages_run_in_order_with_their_variables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = chain(
        tmp_path,
        "variables: {directory: none, word: one}\n"
        "stages:\n"
        '  - {name: first, shell: "echo {word} > {here}/out.txt"}\n'
        '  - {name: second, shell: "echo two >> {here}/out.txt", creates: "{here}/never"}\n'
        '  - {name: third, shell: "echo three >> {here}/out.txt", creates: "{here}/out.txt"}\n',
    )
    assert main(["chain", str(file), "--word", "1"]) == 0
    assert (tmp_path / "out.txt").read_text() == "1\ntwo\n"
    out = capsys.readouterr().out
    assert "== first" in out and "third: " in out and "is there already" in out


def test_options_become_the_commands_words(tmp_path: Path) -> None:
    file = chain(
        tmp_path,
        "variables: {seed: 3}\n"
        "stages:\n"
        "  - {name: a, fastrlhf: train ppo, config: p.yaml, options: {run.seed: '{seed}', data.held_out: null, steps: 4, "
        "fields: [x, y], run.export: true}}\n",
    )
    _, (stage,) = read(file, ["--seed=5"])
    assert stage.command == [
        "train", "ppo", "--config", str(tmp_path / "p.yaml"), "--run.seed", "5", "--data.held_out", "null", "--steps", "4",
        "--fields", "[x, y]", "--run.export", "true",
    ]  # fmt: skip
    assert not stage.shell and stage.creates is None


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("stages: 3", [], "expected the keys variables and stages"),
        ("stages: []\nmore: 1", [], r"got \['stages', 'more'\]"),
        ("stages: [{name: a}]", [], r"stages\.0: expected either shell or fastrlhf"),
        ("stages: [{name: a, shell: x, fastrlhf: y}]", [], r"stages\.0: expected either shell or fastrlhf"),
        ("stages: [{name: a, shel: x}]", [], r"stages\.0: expected name, shell or fastrlhf"),
        ("stages: [{name: a, fastrlhf: trian ppo}]", [], r"stages\.0\.fastrlhf: expected one of .*, got 'trian'"),
        ("stages: [{name: a, shell: 'echo {seeed}'}]", [], r"stages\.0: 'echo \{seeed\}': no variable 'seeed'"),
        ("variables: {seed: 1}\nstages: []", ["--sede", "2"], "--sede: .* has no such variable; it has seed"),
        ("variables: {seed: 1}\nstages: []", ["--seed"], "--seed: expected a value after it"),
        ("stages: [", [], "is no YAML"),
    ],
)
def test_what_is_wrong_with_a_chain_is_named(tmp_path: Path, text: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(chain(tmp_path, text), words)


def test_a_stage_that_fails_ends_the_chain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = chain(tmp_path, "stages:\n  - {name: bad, shell: exit 3}\n  - {name: next, shell: 'touch {here}/ran'}\n")
    assert main(["chain", str(file)]) == 2
    assert "bad: ended with status 3" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert main(["chain", str(tmp_path / "none.yaml")]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["chain", "--help"]) == 0
