"""Runs a script or a module with the hosts of FASTRLHF_PATCH patched when they are imported:

FASTRLHF_PATCH=trl python -m fastrlhf.integrations train.py --its arguments
FASTRLHF_PATCH=openrlhf python -m fastrlhf.integrations -m openrlhf.cli.train_ppo_ray --its arguments
"""

from __future__ import annotations

import os
import runpy
import sys

from . import install


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help") or (words[0] == "-m" and len(words) < 2):
        print(__doc__)
        raise SystemExit(0 if words and words[0] != "-m" else 2)
    install()
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
