"""What the GPU kernels are held to, against what was measured: python -m bench.bars gpu.json [junit.xml ...]"""

from __future__ import annotations

import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .harness import OURS

LOGITS = ("8192x128256", "4096x151936")
HEAD = "8192x128256x4096"  # rows, vocabulary, width
GAE = ("512x4096", "128x16384", "1024x16384", "packed 2097152")
ONE_READ = "logits_policy_loss"  # its cases hold the gradient through `logprobs` too, which reads twice
Figure = float | None


@dataclass(frozen=True)
class Measured:
    """Rows of results, outcomes of tests by `outcomes`' keys, and how many of each test there are."""

    rows: Sequence[dict[str, Any]]
    tests: dict[str, bool]
    expected: dict[str, int]

    def ours(self, op: str, case: str, variant: str = OURS) -> dict[str, Any] | None:
        """The fastest of ours."""
        found = [r for r in self.of(op, case) if r["variant"].startswith(variant)]
        return min(found, key=lambda r: r["median_s"], default=None)

    def of(self, op: str, case: str) -> list[dict[str, Any]]:
        return [r for r in self.rows if r["op"] == op and case in r["case"] and "median_s" in r]

    def share(self, op: str, case: str) -> Figure:
        row = self.ours(op, case)
        return row["of_floor"] if row else None

    def over_floor(self, shape: str) -> Figure:
        """Time over the time that one read and one write of the logits take."""
        row = self.ours(ONE_READ, f"forward + backward {shape}")
        if row is None:
            return None
        rows, vocab = map(int, shape.split("x"))
        return row["median_s"] * row["ceiling_GB_per_s"] * 1e9 / (4 * rows * vocab)

    def times(self, op: str, case: str, other: str) -> Figure:
        """How many times as long the other takes."""
        row = self.ours(op, case)
        found = [r for r in self.of(op, case) if r["variant"].startswith(other)]
        return min(r["median_s"] for r in found) / row["median_s"] if row and found else None

    def times_in_all(self, op: str, case: str, other: str) -> Figure:
        """The same, by what a loop of such calls takes: the host's time where that is the longer."""

        def lasting(row: dict[str, Any]) -> float:
            return max(row["median_s"], row["host_s"])

        row = self.ours(op, case)
        found = [r for r in self.of(op, case) if r["variant"].startswith(other)]
        return min(map(lasting, found)) / lasting(row) if row and found else None

    def extra_gigabytes(self, op: str, case: str, besides: float = 0) -> Figure:
        """How far the memory rises, `besides` bytes of results."""
        row = self.ours(op, case)
        return (row["peak_extra_bytes"] - besides) / 1e9 if row else None

    def slowest_call(self) -> Figure:
        """Microseconds, of the backend chosen when none is named."""
        found = [r["host_s"] for r in self.of("call", "") if r["variant"] == OURS]
        return 1e6 * max(found) if found else None

    def passed(self, test: str) -> Figure:
        """The share that passed of a test's cases; None where not all of them ran and none failed."""
        found = [ok for key, ok in self.tests.items() if f"::{test}[" in key and key.split("::")[1].endswith(".test_device")]
        complete = len(found) >= self.expected.get(test, 1)
        return sum(found) / len(found) if found and (complete or not all(found)) else None


@dataclass(frozen=True)
class Bar:
    text: str
    figure: Callable[[Measured], Figure]
    limit: float
    at_least: bool = True
    unit: str = "x"  # or "%", "us", "GB"

    def holds(self, figure: float) -> bool:
        return figure >= self.limit if self.at_least else figure <= self.limit

    def show(self, figure: float) -> str:
        shown = {"%": f"{figure:.0%}", "x": f"{figure:.2f}x", "GB": f"{figure:.2f} GB"}
        return shown.get(self.unit, f"{figure:.1f} us")


def bars() -> list[Bar]:
    out = []
    for s in LOGITS:
        text = f"logprobs + entropy forward {s}: of the read floor"
        out.append(Bar(text, lambda m, s=s: m.share("logprobs", f"entropy {s}"), 0.9, unit="%"))
    for s in LOGITS:
        step = f"forward + backward {s}"
        out += [
            Bar(f"{step}: of one read and one write", lambda m, s=s: m.over_floor(s), 1.25, at_least=False),
            Bar(f"{step}: torch.compile's time", lambda m, c=step: m.times(ONE_READ, c, "torch.compile"), 1.5),
            Bar(f"{step}: Liger's time", lambda m, c=step: m.times(ONE_READ, c, "Liger"), 1.3),
        ]
    for s in GAE:
        out.append(Bar(f"gae {s}: of its 17-byte floor", lambda m, s=s: m.share("gae", s), 0.6, unit="%"))
    loss, eager = "policy_loss", "torch eager"
    out += [
        Bar(f"{loss} 8M tokens: of its floor", lambda m: m.share(loss, "8388608 tokens"), 0.6, unit="%"),
        Bar(f"{loss} 64k tokens: eager's device time", lambda m: m.times(loss, "65536 tokens", eager), 10),
        Bar(f"{loss} 64k tokens: eager's time in all", lambda m: m.times_in_all(loss, "65536 tokens", eager), 10),
        Bar(f"{loss}: one launch forward, one backward", lambda m: m.passed("test_one_launch"), 1, unit="%"),
    ]
    for d in ("forward", "reverse"):
        out.append(Bar(f"kl_full {d}: of two reads", lambda m, d=d: m.share("kl_full", d), 0.85, unit="%"))
    head, verl = f"forward {HEAD}", "verl"
    step, gradients = (
        f"forward + backward {HEAD}",
        4 * 128256 * 4096 + 2 * 8192 * 4096,
    )  # float32 of the weight, bfloat16 of the rest
    # of the fastest variant, which rounds d logits (workspace_dtype=torch.bfloat16) as what it is compared with does
    out += [
        Bar(f"linear_logprobs {head}: of the bf16 matrix rate", lambda m: m.share("linear_logprobs", head), 0.85, unit="%"),
        Bar(f"linear_logprobs {head}: verl's time", lambda m: m.times("linear_logprobs", head, verl), 2),
        Bar(f"linear_logprobs {head}: extra memory", lambda m: m.extra_gigabytes("linear_logprobs", head), 0.5, False, "GB"),
        Bar(f"linear_policy_loss {HEAD}, both ways: of 6NVH", lambda m: m.share("linear_policy_loss", step), 0.8, unit="%"),
        Bar(f"linear_policy_loss {HEAD}, both ways: verl's time", lambda m: m.times("linear_policy_loss", step, verl), 2),
        Bar(
            f"linear_policy_loss {HEAD}, both ways: memory beyond gradients",
            lambda m: m.extra_gigabytes("linear_policy_loss", step, gradients), 0.5, False, "GB",
        ),
    ]  # fmt: skip
    return [
        *out,
        Bar("call time of the slowest op, 64 tokens", lambda m: m.slowest_call(), 30, at_least=False, unit="us"),
        Bar("captured in a CUDA graph", lambda m: m.passed("test_graph"), 1, unit="%"),
        Bar("bitwise equal over 100 runs", lambda m: m.passed("test_same_bits"), 1, unit="%"),
        Bar("a row's result equal in any batch", lambda m: m.passed("test_rows_of_any_batch"), 1, unit="%"),
    ]


def outcomes(files: Sequence[Path]) -> dict[str, bool]:
    """Of the tests in junit files that were not skipped: by suite, class and name."""
    out = {}
    for file in files:
        for case in ElementTree.parse(file).iter("testcase"):
            if case.find("skipped") is None:
                key = f"{file.stem}::{case.get('classname', '')}::{case.get('name', '')}"
                out[key] = case.find("failure") is None and case.find("error") is None
    return out


def expected() -> dict[str, int]:
    """How many cases the device's tests have."""
    from tests.gpu.calls import TESTS

    return {test: len(cases) for test, cases in TESTS.items()}


def table(rows: Sequence[dict[str, Any]], tests: dict[str, bool] | None = None, expected: dict[str, int] | None = None) -> str:
    measured = Measured(rows, tests or {}, expected or {})
    lines = []
    for bar in bars():
        figure = bar.figure(measured)
        wanted = f"{'>=' if bar.at_least else '<='} {bar.show(bar.limit)}"
        if figure is None or math.isnan(figure):
            lines.append((bar.text, "-", wanted, "not measured"))
        else:
            lines.append((bar.text, bar.show(figure), wanted, "holds" if bar.holds(figure) else "does not hold"))
    width = max(len(line[0]) for line in lines)
    return "\n".join(f"{text.ljust(width)}  {shown:>8}  {wanted:>10}  {verdict}" for text, shown, wanted, verdict in lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())["rows"], outcomes([Path(p) for p in sys.argv[2:]]), expected()))
