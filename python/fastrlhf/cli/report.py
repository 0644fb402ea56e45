"""`fastrlhf report`: the curves of a run that has ended, or of one that is under way."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..training.report import write_report


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("fastrlhf report", description=__doc__)
    parser.add_argument("directory", type=Path, help="a run directory, or one that holds those of several stages")
    directory = parser.parse_args(list(argv)).directory
    if not directory.is_dir():
        raise UserError(f"directory: expected a run directory, got {directory}, which is not there")
    print(write_report(directory))
    return 0
