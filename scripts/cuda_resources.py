"""What each CUDA kernel takes of a multiprocessor, read off the built object:

    python scripts/cuda_resources.py path/to/_cuda*.so [more objects] [--out FILE]

Registers, stack and static shared memory by kernel and architecture, as `cuobjdump --dump-resource-usage` gives them. Exits
with 1 where a kernel has a stack frame, which is where spilled registers go, without a reason in STACK_ALLOWED."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "bench" / "results" / "cuda-resources.json"
# kernel: bytes of stack up to which it does no harm, and why
STACK_ALLOWED: dict[str, tuple[int, str]] = {}

ARCHITECTURE = re.compile(r"arch\s*=\s*(sm_\w+)")
FUNCTION = re.compile(r"Function\s+([\w.$]+):")
USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")


def parse(report: str) -> list[dict[str, object]]:
    """One row for each kernel and architecture."""
    rows: list[dict[str, object]] = []
    architecture = function = ""
    for line in report.splitlines():
        if found := ARCHITECTURE.search(line):
            architecture = found[1]
        if found := FUNCTION.search(line):
            function = found[1]
        if (found := USAGE.search(line)) and function:
            registers, stack, shared, local = map(int, found.groups())
            row = {
                "kernel": function,
                "architecture": architecture,
                "registers": registers,
                "stack": stack,
                "shared": shared,
                "local": local,
            }
            rows.append(row)
            function = ""
    return rows


def demangled(names: list[str]) -> list[str]:
    """Without namespaces and argument lists: `forward_kernel<bf16, true, true, true>`."""
    try:
        text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return names
    noise = r"fastrlhf::gpu::\(anonymous namespace\)::|\(fastrlhf::\w+\)|fastrlhf::|void "
    return [re.sub(noise, "", name).split("(")[0] for name in text.splitlines()]


def broken(rows: list[dict[str, object]]) -> list[str]:
    """The kernels that keep more on the stack than was allowed them."""
    out = []
    for row in rows:
        allowed = STACK_ALLOWED.get(str(row["kernel"]).split("<")[0], (0, ""))[0]
        if int(str(row["stack"])) > allowed or int(str(row["local"])) > allowed:
            out.append(
                f"{row['kernel']} on {row['architecture']}: {row['stack']} bytes of stack, {row['local']} of local memory"
            )
    return out


def table(rows: list[dict[str, object]]) -> str:
    """A line a kernel: registers on each architecture."""
    architectures = sorted({str(r["architecture"]) for r in rows})
    kernels = sorted({str(r["kernel"]) for r in rows})
    by = {(r["kernel"], r["architecture"]): r for r in rows}
    width = max(map(len, kernels))
    lines = [f"{'kernel'.ljust(width)}  " + "  ".join(a.rjust(8) for a in architectures)]
    for kernel in kernels:
        cells = (by.get((kernel, a)) for a in architectures)
        lines.append(
            f"{kernel.ljust(width)}  " + "  ".join(("-" if c is None else str(c["registers"])).rjust(8) for c in cells)
        )
    return "\n".join(lines)


def cuobjdump() -> str:
    """The toolkit's, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump"):
        return found
    import triton

    return str(triton.knobs.nvidia.cuobjdump.path)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("objects", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    rows = []
    for file in arguments.objects:
        command = [cuobjdump(), "--dump-resource-usage", str(file)]
        rows += parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if not rows:
        print("no kernels in", *arguments.objects)
        return 1
    for row, name in zip(rows, demangled([str(r["kernel"]) for r in rows]), strict=True):
        row["kernel"] = name
    print(table(rows))
    rows.sort(key=lambda r: (str(r["kernel"]), str(r["architecture"])))
    arguments.out.write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    for line in broken(rows):
        print(line)
    return 1 if broken(rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
