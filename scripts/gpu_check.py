#!/usr/bin/env python3
"""The proof on a GPU, in one command: build with this machine's nvcc, test on the device, compute-sanitizer, benchmark, plots.

    python3 scripts/gpu_check.py --out build/gpu-check --minutes 8
    python3 scripts/gpu_check.py --only bench,plots --minutes 9

Uses the interpreter it runs under and that interpreter's packages; needs no network. A part that passed leaves a stamp in
the folder and is not run again without --again; a part that fails or runs out of time does not stop the others."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT_OF_TIME = -1
DEVICE_LOST = 3  # as bench says it
GRACE = 20  # seconds to write a report after the time is up


@dataclass
class Outcome:
    ok: bool
    lines: list[str] = field(default_factory=list)


@dataclass
class Run:
    """One invocation: where it writes, and what its parts need to know."""

    out: Path
    results: Path
    cutlass: str | None = None
    revision: str | None = None
    again: bool = False  # nothing of an earlier invocation counts
    deadline: float = float("inf")  # of the part that runs

    @property
    def site(self) -> Path:
        return self.out / "build" / "site"

    def left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def environment(self, **more: str) -> dict[str, str]:
        """What is tested is what was built, not the source tree."""
        path = [str(self.site), str(ROOT), os.environ.get("PYTHONPATH", "")]
        return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in path if p), "PYTHONUNBUFFERED": "1"} | more

    def call(self, command: Sequence[str], log: str, **more: str) -> int:
        """The exit code; OUT_OF_TIME after a friendly interrupt, and a kill of the whole group if that does not help."""
        print(f"   $ {' '.join(command)}", flush=True)
        with (self.out / log).open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment(**more), stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
            )
            try:
                return process.wait(max(1.0, self.left() - GRACE))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                return OUT_OF_TIME
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def tail(self, log: str, lines: int = 12) -> list[str]:
        return (self.out / log).read_text(errors="replace").splitlines()[-lines:]


# --------------------------------------------------------------------------------------------------------------------- build


def architecture(major: int, minor: int) -> str:
    """As CMake names it; from Hopper on with the architecture's own instructions."""
    return f"{major}{minor}a" if major >= 9 else f"{major}{minor}"


def device() -> tuple[str, str]:
    """The GPU's name and architecture, asked of a process of its own: this one keeps no context."""
    code = "import torch; p = torch.cuda.get_device_properties(0); print(p.name, p.major, p.minor, sep='|')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=180)
    name, major, minor = out.stdout.strip().splitlines()[-1].split("|")
    return name, architecture(int(major), int(minor))


def build(run: Run) -> Outcome:
    name, arch = device()
    cores = len(os.sched_getaffinity(0))
    tree = run.out / "build"
    shutil.rmtree(run.site, ignore_errors=True)
    began = time.monotonic()
    code = run.call(
        [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-build-isolation", "--no-index",
         "--no-deps", "-v", "--target", str(run.site), f"-Cbuild-dir={tree / 'cmake'}", str(ROOT)],
        "build.log", FASTRLHF_CUDA="on", FASTRLHF_CUDA_ARCHS=arch, CMAKE_BUILD_PARALLEL_LEVEL=str(cores),
        **({"FASTRLHF_CUTLASS": run.cutlass} if run.cutlass else {}),
    )  # fmt: skip
    lines = [f"{name}, sm_{arch}, {cores} cores: {time.monotonic() - began:.0f} s, {nvcc_times(tree / 'cmake')}"]
    if code:
        return Outcome(False, [*lines, *_why(code), *run.tail("build.log")])
    code = run.call([sys.executable, "-m", "fastrlhf", "doctor"], "doctor.log")
    return Outcome(code == 0, lines + (run.tail("doctor.log") if code else []))


def nvcc_times(tree: Path) -> str:
    """From ninja's log: milliseconds at which each output began and ended."""
    seconds = {}
    if (tree / ".ninja_log").exists():
        for line in (tree / ".ninja_log").read_text().splitlines()[1:]:
            start, end, _, output, *_ = line.split("\t")
            if output.endswith(".cu.o"):
                seconds[Path(output).parent.name + "/" + Path(output).name] = (int(end) - int(start)) / 1e3
    longest = sorted(seconds.items(), key=lambda x: -x[1])[:4]
    return f"nvcc {sum(seconds.values()):.0f} s in {len(seconds)} files" + "".join(f", {n} {s:.0f}" for n, s in longest)


# --------------------------------------------------------------------------------------------------------------------- tests


SUITES = {
    "gpu": ["tests/gpu"],
    "triton": ["tests/ops", "--kernels", "triton"],
    "cuda": ["tests/ops", "--kernels", "cuda"],
}


def tests(run: Run) -> Outcome:
    """Three runs of pytest, each with a share of the time; what one leaves goes to the next."""
    outcome, deadline = Outcome(True), run.deadline
    for i, (name, arguments) in enumerate(SUITES.items()):
        run.deadline = time.monotonic() + (deadline - time.monotonic()) / (len(SUITES) - i)
        report = run.out / f"{name}.xml"
        report.unlink(missing_ok=True)
        code = run.call(
            [sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider", f"--junitxml={report}", *helpers()],
            f"tests-{name}.log",
        )
        counts, failures = junit(report)
        good = code == 0 and bool(counts)
        outcome.ok &= good
        outcome.lines.append(f"{name}: {counts or 'no report'}")
        if not good:
            outcome.lines += [*_why(code), *failures[:15], *([f"... and {len(failures) - 15} more"] if failures[15:] else [])]
            outcome.lines += [] if failures else run.tail(f"tests-{name}.log", 6)
    run.deadline = deadline
    return outcome


def helpers() -> list[str]:
    """Options of plugins that are there. In parallel, since compiling Triton kernels takes most of the time."""
    out = ["-n", str(min(8, len(os.sched_getaffinity(0))))] if find_spec("xdist") else []
    return out + (["--timeout=120", "--timeout-method=thread"] if find_spec("pytest_timeout") else [])


def junit(report: Path) -> tuple[str, list[str]]:
    """Counts, and a line for each failure."""
    if not report.exists():
        return "", []
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures, skipped = [], 0
    for case in cases:
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped += case.find("skipped") is not None
        if bad is not None:
            message = (bad.get("message") or bad.text or "").strip().splitlines() or [""]
            failures.append(f"  {case.get('classname')}::{case.get('name')}: {message[0][:160]}")
    return f"{len(cases) - len(failures) - skipped} passed, {len(failures)} failed, {skipped} skipped", failures


# ----------------------------------------------------------------------------------------------------------------- sanitizer


TOOLS = ("memcheck", "racecheck", "initcheck")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")


def sanitizer(run: Run) -> Outcome:
    """Every kernel once. initcheck, which also sees torch's own kernels, is reported and decides nothing."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return Outcome(False, ["compute-sanitizer is not on the PATH"])
    outcome = Outcome(True)
    script = [sys.executable, "-m", "tests.gpu.calls", "--device", "cuda", "--backend"]
    # without torch's pool every tensor is an allocation of its own, beyond whose ends memcheck sees
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for backend in ("triton", "cuda"):
        code = run.call([*script, backend], f"calls-{backend}.log")  # compiles, and shows what fails by itself
        if code:
            outcome.ok = False
            outcome.lines += [f"{backend}: the calls fail by themselves", *_why(code), *run.tail(f"calls-{backend}.log", 6)]
    for check in TOOLS:
        for backend in ("cuda", "triton"):
            log = f"{check}-{backend}.log"
            if run.left() < 2 * GRACE:
                outcome.ok &= check == "initcheck"
                outcome.lines.append(f"{check} {backend}: no time left")
                continue
            command = [tool, "--tool", check, "--target-processes", "application-only", "--print-limit", "20"]
            code = run.call([*command, *script, backend], log, **alone)
            found = SUMMARY.findall((run.out / log).read_text(errors="replace"))
            good = code == 0 and bool(found) and not any(map(int, found))
            outcome.ok &= good or check == "initcheck"
            outcome.lines.append(f"{check} {backend}: {found[-1] + ' found' if found else 'no summary'}")
            if not good:
                outcome.lines += [*_why(code), *run.tail(log, 6 if not found else 2)]
    return outcome


# ------------------------------------------------------------------------------------------------------------- bench, plots


def bench(run: Run) -> Outcome:
    """Measured cases stay in the file. A kernel that takes the device with it costs its case and a new process."""
    file = run.out / "bench.json"
    if run.again:
        file.unlink(missing_ok=True)
    code, attempt = DEVICE_LOST, 0
    while code == DEVICE_LOST and attempt < 5:
        attempt += 1
        minutes = (run.left() - 2 * GRACE) / 60
        options = ["--revision", run.revision] if run.revision else []
        command = [
            sys.executable,
            "-m",
            "bench",
            "--device",
            "cuda",
            "--minutes",
            f"{minutes:.2f}",
            "--out",
            str(file),
            *options,
        ]
        code = run.call(command, f"bench-{attempt}.log")
    if not file.exists():
        return Outcome(False, [*_why(code), *run.tail(f"bench-{attempt}.log")])
    data = json.loads(file.read_text())
    skipped = [r for r in data["rows"] if "skipped" in r]
    lines = [f"{len(data['rows'])} rows; " + ", ".join(f"{k} {v / 1e12:.3g} T/s" for k, v in data["ceilings"].items())]
    lines += [f"skipped: {r['op']} {r['case']}, {r['variant']}: {r['skipped'][:120]}" for r in skipped[:12]]
    return Outcome(code == 0, lines + _why(code))


def plots(run: Run) -> Outcome:
    """Also the results under the name that is kept, <gpu>-<date>, and the table of bars."""
    file = run.out / "bench.json"
    if not file.exists():
        return Outcome(False, ["no bench.json: run the part bench"])
    gpu = json.loads(file.read_text())["machine"]["gpu"]
    named = run.results / f"{re.sub('[^a-z0-9]+', '-', gpu.lower())}-{date.today().isoformat()}.json"
    run.results.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, named)
    reports = [str(p) for p in (run.out / f"{name}.xml" for name in SUITES) if p.exists()]
    drawn = run.call([sys.executable, "-m", "bench.report", str(named), "--plots"], "plots.log")
    compared = run.call([sys.executable, "-m", "bench.bars", str(named), *reports], "bars.txt")
    bad = [*_why(drawn), *run.tail("plots.log", 4)] if drawn else []
    return Outcome(drawn == compared == 0, [str(named), *bad, *run.tail("bars.txt", 40)])


def _why(code: int) -> list[str]:
    return ["out of time"] if code == OUT_OF_TIME else [f"exit code {code}"] if code else []


# ---------------------------------------------------------------------------------------------------------------------- main


@dataclass(frozen=True)
class Part:
    name: str
    run: Callable[[Run], Outcome]
    weight: float  # of the time there is; what a part leaves goes to those after it


PARTS = [
    Part("build", build, 2.5), Part("tests", tests, 4), Part("sanitizer", sanitizer, 3), Part("bench", bench, 6),
    Part("plots", plots, 0.5),
]  # fmt: skip


def chosen(only: str, parts: Sequence[Part]) -> list[Part]:
    """In the order in which they build on each other."""
    names = [n for n in only.split(",") if n] or [p.name for p in parts]
    unknown = set(names) - {p.name for p in parts}
    if unknown:
        raise ValueError(f"--only: no part {sorted(unknown)}; there are {[p.name for p in parts]}")
    return [p for p in parts if p.name in names]


def check(run: Run, parts: Sequence[Part], minutes: float) -> dict[str, str]:
    """Runs what has no stamp yet and says of each part how it went."""
    end = time.monotonic() + 60 * minutes
    stamps = run.out / "stamps"
    stamps.mkdir(parents=True, exist_ok=True)
    verdicts = {}
    for i, part in enumerate(parts):
        stamp = stamps / part.name
        if stamp.exists() and not run.again:
            verdicts[part.name] = f"passed before ({stamp.read_text().strip()})"
            continue
        stamp.unlink(missing_ok=True)
        if time.monotonic() > end:
            verdicts[part.name] = "FAILED: no time left"
            continue
        began = time.monotonic()
        share = part.weight / sum(p.weight for p in parts[i:])
        run.deadline = began + (end - began) * share
        print(f"== {part.name}, at most {run.left():.0f} s", flush=True)
        try:
            outcome = part.run(run)
        except Exception as error:
            outcome = Outcome(False, [f"{type(error).__name__}: {error}"])
        took = f"{time.monotonic() - began:.0f} s"
        print("\n".join(f"   {line}" for line in outcome.lines), flush=True)
        if outcome.ok:
            stamp.write_text(took + "\n")
        verdicts[part.name] = f"passed in {took}" if outcome.ok else f"FAILED after {took}"
    return verdicts


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="stamps, logs, reports and the build")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="where figures and plots are kept")
    parser.add_argument("--only", default="", help=f"some of {','.join(p.name for p in parts)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--again", action="store_true", help="also what passed before")
    parser.add_argument("--cutlass", help="folder of CUTLASS's headers")
    parser.add_argument("--revision", help="of the sources, where git cannot say it")
    given = parser.parse_args(arguments)
    try:
        selected = chosen(given.only, parts)
    except ValueError as error:
        parser.error(str(error))
    run = Run(given.out.resolve(), given.results.resolve(), given.cutlass, given.revision, given.again)
    run.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes what is running along
    verdicts = check(run, selected, given.minutes)
    width = max(map(len, verdicts))
    print("\n" + "\n".join(f"{name.ljust(width)}  {verdict}" for name, verdict in verdicts.items()))
    return 1 if any(v.startswith("FAILED") for v in verdicts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
