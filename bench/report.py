"""A table to read, JSON to keep, a plot to show."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import fastrlhf
import torch
from fastrlhf import _cpu

from . import peers
from .harness import OURS

COLUMNS = ("variant", "median", "p20", "p80", "GB/s", "of floor", "x ours", "peak extra", "max error", "call")


def machine() -> dict[str, Any]:
    def processor() -> str:
        with open("/proc/cpuinfo") as f:
            return next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.machine())

    def revision() -> str:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
        except OSError:
            return "unknown"

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "isa": _cpu.isa(),
        "python": sys.version.split()[0], "fastrlhf": fastrlhf.__version__, "revision": revision(), **peers.versions(),
    }  # fmt: skip


def seconds(t: float) -> str:
    return f"{t * 1e6:.1f} us" if t < 1e-3 else f"{t * 1e3:.2f} ms" if t < 1 else f"{t:.2f} s"


def size(n: int | None) -> str:
    return "-" if n is None else f"{n / 2**20:.1f} MiB"


def cells(row: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return [row["variant"], "skipped: " + row["skipped"]]
    return [
        row["variant"], seconds(row["median_s"]), seconds(row["p20_s"]), seconds(row["p80_s"]),
        f"{row['GB_per_s']:.1f}" if "GB_per_s" in row else "-", f"{row['of_floor']:.0%}" if "of_floor" in row else "-",
        f"{row['slower_than_ours']:.2f}", size(row.get("peak_extra_bytes")),
        f"{row['max_error']:.1e}" if "max_error" in row else "-", *([seconds(row["host_s"])] if "host_s" in row else []),
    ]  # fmt: skip


def print_case(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['op']}: {rows[0]['case']}")
    columns = COLUMNS if any("host_s" in r for r in rows) else COLUMNS[:-1]
    table = [list(columns), *(cells(r) for r in rows)]
    widths = [max(len(line[i]) for line in table if i < len(line) and len(line) > 2) for i in range(len(columns))]
    for line in table:
        print(
            "  " + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=False))),
            flush=True,
        )


def save(path: Path, ceilings: dict[str, float], rows: list[dict[str, Any]], extra: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"machine": machine() | (extra or {}), "ceilings": ceilings}
    path.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    print(f"\nwrote {path}")


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """How many times slower than ours each variant is, by case."""
    wanted = [r for r in rows if "median_s" in r and r["op"] != "call" and r["variant"] != OURS]
    _bars(path, wanted, "slower_than_ours", "time over fastrlhf's (log scale)", "log")


def plot_floor(path: Path, rows: list[dict[str, Any]]) -> None:
    """The share of the floor that each of our variants reaches, by case."""
    wanted = [r for r in rows if "of_floor" in r and r["variant"].startswith(OURS)]
    _bars(path, wanted, "of_floor", "share of the floor", "linear")


def _bars(path: Path, rows: list[dict[str, Any]], value: str, text: str, scale: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    if not rows:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{r['op']} {r['case']}\n{r['variant']}" for r in rows]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(rows) + 1))
    axes.barh(range(len(rows)), [r[value] for r in rows], color="#3b6ea5")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale(scale)
    axes.set_xlabel(text)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def markdown(path: Path) -> str:
    """The tables of docs/benchmarks.md from a file of results: `python -m bench.report FILE.json`."""
    data = json.loads(path.read_text())
    rows = [r for r in data["rows"] if "skipped" not in r]
    m = data["machine"]
    lines = [
        f"{m['gpu'] + ', ' if 'gpu' in m else ''}{m['processor']}, {m['cores']} cores, {m['isa']}, torch {m['torch']}, "
        f"TRL {m['trl']}, verl {m['verl']}, revision {m['revision']}.", "",
        "| op | case | variant | median | times ours | of floor | largest error |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        if r["op"] == "call":
            continue
        name = f"**{r['variant']}**" if r["variant"].startswith(OURS) else r["variant"]
        floor = f"{r['of_floor']:.0%}" if "of_floor" in r else ""
        error = f"{r['max_error']:.0e}" if "max_error" in r else ""
        times = f"{r['slower_than_ours']:.2f}"
        lines.append(f"| {r['op']} | {r['case']} | {name} | {seconds(r['median_s'])} | {times} | {floor} | {error} |")
    calls = [f"| {r['case']} | {seconds(r['median_s'])} | {seconds(r['p20_s'])} |" for r in rows if r["op"] == "call"]
    if calls:
        lines += ["", "| op | median | p20 |", "|---|---|---|", *calls]
    return "\n".join(lines)


if __name__ == "__main__":
    if "--plots" in sys.argv:
        results = Path(sys.argv[1])
        found = json.loads(results.read_text())["rows"]
        plot(results.with_suffix(".png"), found)
        plot_floor(results.with_suffix(".floor.png"), found)
    else:
        print(markdown(Path(sys.argv[1])))
