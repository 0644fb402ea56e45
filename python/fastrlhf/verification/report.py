"""What was found, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .checking import Result
from .seams import NO_INPUT, Speed


@dataclass
class Findings:
    """Of one run of `fastrlhf verify`."""

    versions: dict[str, str | None]
    device: str
    dtype: str
    shapes: str
    backends: dict[str, str]
    results: list[Result] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Result]:
        return [r for r in self.results if r.passed is False]

    @property
    def uncompared(self) -> list[Result]:
        return [r for r in self.results if r.passed is None]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": not self.failed}

    def __str__(self) -> str:
        versions = ", ".join(f"{k} {v}" for k, v in self.versions.items() if v)
        lines = [f"fastrlhf verify: {self.shapes} {self.dtype} on {self.device}", versions, ""]
        for kind, title in (("op", "operations, against their definition in float64"), ("seam", "seams, against the host")):
            rows = [_row(name, group) for name, group in _by_name(r for r in self.results if r.kind == kind)]
            if rows:
                lines += [title, *table(("", "inputs", "failed", "largest error", "its bar", ""), rows), ""]
        if self.speeds:
            lines += ["speed and memory, the host's beside ours", *table(SPEED, [_speed(s) for s in self.speeds]), ""]
        lines += [
            f"{r.name} on {r.input}: the host's is {r.hosts_error:.1e} from its own function in float64, ours {r.error:.1e}"
            for r in self.results
            if r.hosts_error is not None
        ]
        lines += [f"FAILED {r.name} on {r.input}: {r.note}" for r in self.failed]
        lines += self.notes
        lines += [f"not compared: {r.name} on {r.input}, {r.note}" for r in self.uncompared if r.input != NO_INPUT]
        total = len(self.results) - len(self.uncompared)
        lines.append(
            f"{total - len(self.failed)} of {total} comparisons passed{'' if self.failed else ': all'}"
            + (f"; {len(self.uncompared)} not compared" if self.uncompared else "")
        )
        return "\n".join(lines)


SPEED = ("", "input", "host", "ours", "faster", "host holds", "ours")


def _by_name(results: Iterable[Result]) -> list[tuple[str, list[Result]]]:
    groups: dict[str, list[Result]] = {}
    for r in results:
        groups.setdefault(r.name, []).append(r)
    return list(groups.items())


def _row(name: str, group: Sequence[Result]) -> tuple[str, ...]:
    measured = [r for r in group if r.error is not None]
    worst = max(measured, key=lambda r: (r.error or 0) / (r.bar or 1), default=None)
    compared = [r for r in group if r.passed is not None]
    note = next((f"not compared: {r.note}" for r in group if r.input == NO_INPUT), "")
    counts = name, str(len(compared)), str(sum(not r.passed for r in compared))
    if worst is None:
        return *counts, "-", "-", note
    return *counts, f"{worst.error:.1e}", f"{worst.bar:.1e}", note


def _speed(s: Speed) -> tuple[str, ...]:
    return (
        s.seam, s.input, _time(s.theirs_seconds), _time(s.ours_seconds), f"{s.theirs_seconds / s.ours_seconds:.1f}x",
        _bytes(s.theirs_bytes), _bytes(s.ours_bytes),
    )  # fmt: skip


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of their widest cell."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [head, *rows]]
