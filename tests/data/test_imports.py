"""What importing the data floor may import."""

from __future__ import annotations

import subprocess
import sys


def test_libraries_of_the_extra_are_imported_when_asked_for():
    loaded = "import sys, fastrlhf.data; print(sorted({m.split('.')[0] for m in sys.modules}))"
    names = subprocess.run([sys.executable, "-c", loaded], check=True, capture_output=True, text=True).stdout
    assert "'numpy'" in names
    for name in ("transformers", "tokenizers", "datasets", "pyarrow", "jinja2"):
        assert f"'{name}'" not in names
