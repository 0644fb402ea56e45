"""The benchmark of the queue runs, over replicas that are several."""

from __future__ import annotations

from bench.balance import Case, measure, summary


def test_a_short_run_of_the_benchmark() -> None:
    case = Case(processes=2, sequences=32, samples=4, draws=1, slots=4, most=30, step=0.002)
    rows = measure(case)
    assert [(row["visit"], row["queue"]) for row in rows] == [(0, False), (0, True), (1, False), (1, True)]
    assert all(row["steps"] >= 30 and row["seconds"] > 0.002 * row["steps"] for row in rows)
    found = summary(rows)
    assert set(found) == {"first", "later"} and set(found["first"]) == {"idle", "steps", "seconds"}
    assert all(visit["steps"]["of static"] < 1.3 for visit in found.values())
