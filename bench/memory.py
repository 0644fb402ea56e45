"""How far a process's resident memory rises while each variant of a case runs: in a process of its own, whose allocator gives
back at once what is freed, after a run that loads and compiles what there is to.

python -m bench.memory SUITE NUMBER [--short]: {variant: [bytes, bytes of what it returns]} as JSON"""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

# Else freed blocks of up to 32 MB stay with the process, and what takes their place next does not show.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peaks(suite: str, number: int, short: bool) -> dict[str, list[int]]:
    """Of the cases of a suite, the number-th; empty where the system does not tell."""
    command = [sys.executable, "-m", "bench.memory", suite, str(number), *["--short"] * short]
    out = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True)
    if out.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {out.stdout[-1000:]}{out.stderr[-1000:]}")
    return json.loads(out.stdout.splitlines()[-1])


def of(run: Callable[[], Any]) -> list[int]:
    """Bytes that one run adds at its highest, what it returns included, and the bytes of that."""
    run()
    gc.collect()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    tensors = result if isinstance(result, Iterable) and not isinstance(result, Tensor) else (result,)
    return [max(0, peak - before) * 1024, sum(t.nbytes for t in tensors if isinstance(t, Tensor))]


def _status(field: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field))


def main() -> int:
    from .__main__ import SUITES
    from .harness import quiet

    suite, number = sys.argv[1], int(sys.argv[2])
    found = {}
    with quiet():
        case = next(itertools.islice(SUITES[suite].cases("--short" in sys.argv), number, None))
        for name, variant in case.variants.items():
            try:
                found[name] = of(variant.run)
            except OSError:  # no /proc
                break
            except Exception:  # the timing says why
                continue
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
