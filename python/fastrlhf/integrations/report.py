"""What became of each seam."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

LIVE, WAITING, NOT_LIVE = "live", "waiting", "not live"


@dataclass
class Status:
    """One seam.

    Args:
        state: "live"; "waiting" for the host to import the module; "not live", and `note` says why.
        places: how many names hold the replacement.
        error: the largest difference from the host's function in the calls that were compared; None if none was.
    """

    seam: str
    op: str
    state: str
    note: str = ""
    places: int = 0
    error: float | None = None


@dataclass
class Report:
    """Every seam of one host."""

    host: str
    version: str | None
    tested: tuple[str, str]
    known: bool
    seams: list[Status] = field(default_factory=list)

    @property
    def live(self) -> list[str]:
        return [s.seam for s in self.seams if s.state == LIVE]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        count = {state: sum(s.state == state for s in self.seams) for state in (LIVE, WAITING, NOT_LIVE)}
        version = self.version or "not installed"
        known = "" if self.known or self.version is None else f", outside the tested {self.tested[0]} to {self.tested[1]}"
        return (
            f"fastrlhf in {self.host} {version}{known}: {count[LIVE]} seams live, {count[WAITING]} wait for their module to be "
            f"imported, {count[NOT_LIVE]} not live"
        )

    def __str__(self) -> str:
        width = max((len(s.seam) for s in self.seams), default=0)
        lines = [self.summary()]
        for s in self.seams:
            detail = s.note
            if s.state == LIVE:
                compared = [] if s.error is None else [f"differs by at most {s.error:.1e}"]
                where = [] if s.places == 1 else [f"in {s.places} places"]
                detail = ", ".join(filter(None, [s.op, *compared, *where, s.note]))
            lines.append(f"  {s.seam.ljust(width)}  {s.state.ljust(8)}  {detail}")
        return "\n".join(lines)
