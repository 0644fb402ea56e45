"""The command: its table, its exit status, and doctor."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import fastrlhf
import pytest
from fastrlhf.cli import doctor, main
from fastrlhf.cli.main import COMMANDS, Command
from fastrlhf.errors import ConfigError, UserError
from fastrlhf.ops import backend


@pytest.fixture
def command(monkeypatch):
    """Registers a subcommand `try` that does what the test wants."""

    def register(work):
        module = types.ModuleType("a_command")
        module.main = work
        monkeypatch.setitem(sys.modules, "a_command", module)
        monkeypatch.setitem(COMMANDS, "try", Command("try it", "a_command:main"))

    return register


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(words, capsys):
    assert main.main(words) == 0
    out = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert f"  {name}" in out and entry.help in out
    assert {"train", "generate", "init", "report", "doctor"} <= set(COMMANDS)


def test_version(capsys):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastrlhf {fastrlhf.__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"), [("doctr", "did you mean doctor?"), ("trian", "did you mean train?"), ("zzz", "the commands are train, ")]
)
def test_an_unknown_command(word, hint, capsys):
    assert main.main([word]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastrlhf: {word}: no such command; ") and hint in err and err.count("\n") == 1


def test_arguments_and_status_pass_through(command):
    seen = []
    command(lambda argv: seen.append(argv) or 5)
    assert main.main(["try", "--a.b", "c"]) == 5 and seen == [["--a.b", "c"]]
    command(lambda argv: None)
    assert main.main(["try"]) == 0


def raising(error: BaseException):
    def work(argv):
        raise error

    return work


@pytest.mark.parametrize("error", [UserError("x: wrong"), ConfigError("x: wrong")])
def test_a_users_error_is_one_line(error, command, capsys):
    command(raising(error))
    assert main.main(["try"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "fastrlhf: x: wrong\n" and captured.out == ""
    for words in (["--debug", "try"], ["try", "--debug"]):
        with pytest.raises(UserError):
            main.main(words)


def test_other_errors_keep_their_traceback(command):
    command(raising(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        main.main(["try"])


def test_an_interrupt(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert main.main(["try"]) == 130 and capsys.readouterr().err == "fastrlhf: interrupted\n"


def test_as_a_module():
    program = [sys.executable, "-m", "fastrlhf", "nonsense"]
    out = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert out.returncode == 2 and "Traceback" not in out.stderr and "no such command" in out.stderr


def test_importing_the_package_imports_no_optional_one():
    program = (
        "import sys, fastrlhf.config, fastrlhf.cli.main, fastrlhf.cli.console, fastrlhf.cli.doctor, fastrlhf.training.checkpoint,"
        "fastrlhf.training.metrics, fastrlhf.training.report, fastrlhf.training.timers;"
        "print([m for m in ('yaml', 'rich', 'tensorboard', 'matplotlib', 'wandb', 'safetensors', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert out.stdout == "[]\n", out.stdout + out.stderr


def test_doctor_says_what_each_op_uses(capsys):
    assert main.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["backends"]) >= {"logprobs", "gae", "policy_loss", "value_loss", "sample", "whiten"}
    assert {b["cpu"] for b in found["backends"].values()} == {"cpu"}
    assert found["cpu"]["instruction set in use"] in found["cpu"]["instruction sets"] and found["cpu"]["threads"] >= 1
    assert found["versions"]["fastrlhf"] == fastrlhf.__version__ and found["packages"]["pyyaml"]["extra"] == "train"
    assert main.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in ("versions", "logprobs", found["cpu"]["model"], found["versions"]["torch"]):
        assert part in out
    columns = {line.index(" cpu ") for line in out[out.index("backends") :].splitlines()}
    assert len(columns) == 1


def test_doctor_asks_the_chooser(monkeypatch):
    monkeypatch.setattr(backend, "_default", "reference")
    assert set(b["cpu"] for b in doctor.diagnose()["backends"].values()) == {"reference"}
    monkeypatch.setattr(backend, "_default", "triton")
    found = doctor.diagnose()["backends"]["gae"]["cpu"]
    assert found.startswith("none: no kernels for device 'cpu': triton: needs a GPU, or TRITON_INTERPRET=1.")


def test_doctor_names_the_extra_of_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"train": ("no-such-package",)})
    found = doctor.diagnose()
    assert found["packages"] == {"no-such-package": {"version": None, "extra": "train"}}
    assert "missing: pip install 'fastrlhf[train]'" in doctor.render(found)


def test_report_command(tmp_path, capsys):
    assert main.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert main.main(["report", str(tmp_path / "none")]) == 2
    assert "none, which is not there" in capsys.readouterr().err
