"""The `fastrlhf` command: a table of subcommands, each imported when it is called."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import UserError


class Command(NamedTuple):
    """`target` is module:function; the function takes the arguments after the name and returns the exit status."""

    help: str
    target: str


COMMANDS = {
    "train": Command("train a model: sft, reward, dpo, ppo, grpo, rloo", "fastrlhf.cli.train:main"),
    "chain": Command("run several of these one after another, as SFT, reward model and PPO", "fastrlhf.cli.chain:main"),
    "plan": Command("which tp x pp x dp of a model fit on so many GPUs, computed", "fastrlhf.cli.plan:main"),
    "generate": Command("sample completions from a model", "fastrlhf.cli.generate:main"),
    "init": Command("make a small model with random weights and its tokenizer", "fastrlhf.cli.init:main"),
    "report": Command("draw the curves of a run into report.html and report.png", "fastrlhf.cli.report:main"),
    "verify": Command("whether operations and patched frameworks are right on this machine", "fastrlhf.cli.verify:main"),
    "refit": Command(
        "plan a refit between two layouts, or check an engine's files against its contract", "fastrlhf.cli.refit:main"
    ),
    "doctor": Command("what is installed here, and which kernels each operation will use", "fastrlhf.cli.doctor:main"),
}
USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit status: 2 where the user's input was at fault, which one line on stderr
    explains; `--debug`, anywhere, shows the traceback too."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        from .. import __version__

        print(f"fastrlhf {__version__}")
        return 0
    try:
        return dispatch(words[0], words[1:])
    except UserError as error:
        if debug:
            raise
        print(f"fastrlhf: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        if debug:
            raise
        print("fastrlhf: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `fastrlhf doctor | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastrlhf COMMAND [arguments]", "", "RLHF from SFT to PPO on kernels that touch memory once.", "",
            "commands:", *lines, "", "fastrlhf COMMAND --help explains a command; --debug shows the traceback of an error;",
            "--version prints the version.",
        ]
    )  # fmt: skip


def dispatch(name: str, arguments: list[str]) -> int:
    """Runs one subcommand; its exit status."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"{name}: no such command; {hint}")
    module, _, function = COMMANDS[name].target.partition(":")
    return int(getattr(importlib.import_module(module), function)(arguments) or 0)
