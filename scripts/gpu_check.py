#!/usr/bin/env python3
"""The proof on a GPU, in one command: build with this machine's nvcc, test on the device, compute-sanitizer, benchmark, plots.

    python3 scripts/gpu_check.py --out build/gpu-check --minutes 8
    python3 scripts/gpu_check.py --only bench,plots --minutes 9

Uses the interpreter it runs under and that interpreter's packages; needs no network. A part that passed leaves a stamp in the
folder and is not run again, as long as its sources and the GPU are the same, without --again. One that fails stops only those
that need it; one that does not fit into the time says so, and comes first in the next run."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
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
GRACE = 20  # seconds in which pytest and the benchmark write their reports after the time is up


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
    gpu: str = "none"
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

    def key(self, sources: Sequence[str]) -> str:
        """What a result is a result of: the sources, what was built in, the GPU."""
        digest = hashlib.sha256(f"{self.cutlass}\n".encode())
        for file in sorted(f for name in sources for f in files_of(ROOT / name)):
            digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
        return f"{digest.hexdigest()[:16]} on {self.gpu}"

    def call(self, command: Sequence[str], log: str, grace: float = 2, **more: str) -> int:
        """The exit code; OUT_OF_TIME after a friendly interrupt, and a kill of the whole group if that does not help."""
        print(f"   $ {' '.join(command)}", flush=True)
        with (self.out / log).open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment(**more), stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
            )
            try:
                return process.wait(max(1.0, self.left() - grace))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
                return OUT_OF_TIME
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def tail(self, log: str, lines: int = 12) -> list[str]:
        return (self.out / log).read_text(errors="replace").splitlines()[-lines:]


def files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    kinds = {".py", ".cu", ".cuh", ".h", ".cpp", ".cmake", ".json"}
    return [f for f in path.rglob("*") if f.suffix in kinds and "results" not in f.parts]


def gpu_here() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip().split("\n")[0] or "none"
    except (OSError, subprocess.TimeoutExpired):
        return "none"


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


HEAD_IS_THERE = "from fastrlhf import _cuda; raise SystemExit(not _cuda.has_linear_logprobs(9, 0))"


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
    lines += run.tail("doctor.log") if code else []
    if arch == "90a" and run.call([sys.executable, "-c", HEAD_IS_THERE], "head.log"):
        lines.append("the Hopper kernels of linear_logprobs were NOT built: no CUTLASS headers (--cutlass FOLDER)")
    return Outcome(code == 0, lines)


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


def tests(name: str) -> Callable[[Run], Outcome]:
    def suite(run: Run) -> Outcome:
        report = run.out / f"{name}.xml"
        report.unlink(missing_ok=True)
        code = run.call(
            [sys.executable, "-m", "pytest", *SUITES[name], "-p", "no:cacheprovider", f"--junitxml={report}", *helpers()],
            f"tests-{name}.log", GRACE,
        )  # fmt: skip
        counts, failures = junit(report)
        outcome = Outcome(code == 0 and bool(counts), [counts or "no report"])
        if not outcome.ok:
            outcome.lines += [*_why(code), *failures[:15], *([f"... and {len(failures) - 15} more"] if failures[15:] else [])]
            outcome.lines += [] if failures else run.tail(f"tests-{name}.log", 6)
        return outcome

    return suite


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


SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)")


def sanitizer(check: str) -> Callable[[Run], Outcome]:
    """Every kernel on small inputs under one tool."""

    def under(run: Run) -> Outcome:
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            return Outcome(False, ["compute-sanitizer is not on the PATH"])
        outcome = Outcome(True)
        script = [sys.executable, "-m", "tests.gpu.calls", "--device", "cuda", "--backend"]
        command = [tool, "--tool", check, "--target-processes", "application-only", "--print-limit", "20"]
        for backend in ("cuda", "triton"):
            log = f"{check}-{backend}.log"
            # without torch's pool every tensor is an allocation of its own, beyond whose ends memcheck sees
            code = run.call([*command, *script, backend], log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            found = SUMMARY.findall((run.out / log).read_text(errors="replace"))
            good = code == 0 and bool(found) and not any(map(int, found))
            outcome.ok &= good
            outcome.lines.append(f"{backend}: {found[-1] + ' found' if found else 'no summary'}")
            if not good:
                outcome.lines += [*_why(code), *run.tail(log, 6 if not found else 2)]
        return outcome

    return under


# ------------------------------------------------------------------------------------------------------------- bench, plots


def bench(run: Run) -> Outcome:
    """Measured cases stay in the file. A kernel that takes the device with it costs its case and a new process."""
    file = run.out / "bench.json"
    if run.again:
        file.unlink(missing_ok=True)
    options = ["--sources", run.key(BENCHMARKED), *(["--revision", run.revision] if run.revision else [])]
    code, attempt = DEVICE_LOST, 0
    while code == DEVICE_LOST and attempt < 5:
        attempt += 1
        minutes = f"{(run.left() - 2 * GRACE) / 60:.2f}"
        command = [sys.executable, "-m", "bench", "--device", "cuda", "--minutes", minutes, "--out", str(file), *options]
        code = run.call([*command, *(["--keep-skipped"] if attempt > 1 else [])], f"bench-{attempt}.log", GRACE)
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
    seconds: float  # expected on 16 cores, at the most; of the time there is, its share. What a part leaves goes to the rest
    sources: tuple[str, ...] | None = ()  # None: it leaves no stamp
    needs: tuple[str, ...] = ("build",)
    least: float = 20  # with less it is not begun

    @property
    def group(self) -> str:
        return self.name.split("-")[0]


BUILT = ("CMakeLists.txt", "pyproject.toml", "cmake", "src", "kernels", "python")
TESTED, BENCHMARKED = (*BUILT, "tests", "bench"), (*BUILT, "bench")
PARTS = [
    Part("build", build, 150, BUILT, (), 60),  # the slowest file takes 45 s on a quiet core; ninja goes on where it was stopped
    *(Part(f"tests-{name}", tests(name), 50, TESTED) for name in SUITES),
    *(Part(f"sanitizer-{tool}", sanitizer(tool), 35, TESTED) for tool in ("memcheck", "racecheck")),
    Part("bench", bench, 100, BENCHMARKED, least=60),
    Part("plots", plots, 10, None, least=5),
]


def chosen(only: str, parts: Sequence[Part]) -> list[Part]:
    """By name or by what comes before the dash, in the order in which they build on each other."""
    names = [n for n in only.split(",") if n] or [p.name for p in parts]
    known = {p.name for p in parts} | {p.group for p in parts}
    if set(names) - known:
        raise ValueError(f"--only: no part {sorted(set(names) - known)}; there are {[p.name for p in parts]}")
    return [p for p in parts if p.name in names or p.group in names]


def stamped(run: Run, part: Part) -> str | None:
    """How long it took, where it passed with these sources on this GPU."""
    if part.sources is None:
        return None
    file = run.out / "stamps" / part.name
    took, _, key = file.read_text().partition("\n") if file.exists() else ("", "", "")
    return took if took and key.strip() == run.key(part.sources) else None


def check(run: Run, parts: Sequence[Part], minutes: float, every: Sequence[Part] = ()) -> dict[str, str]:
    """Runs what has no valid stamp yet and says of each part how it went; `every`: those that others may need."""
    end = time.monotonic() + 60 * minutes
    (run.out / "stamps").mkdir(parents=True, exist_ok=True)
    verdicts = {}
    open_ = [p for p in parts if run.again or stamped(run, p) is None]
    by_name = {p.name: p for p in (*every, *parts)}
    for part in parts:
        if part not in open_:
            verdicts[part.name] = f"passed before ({stamped(run, part)})"
            continue
        stamp = run.out / "stamps" / part.name
        stamp.unlink(missing_ok=True)
        missing = [n for n in part.needs if n in by_name and stamped(run, by_name[n]) is None]
        began = time.monotonic()
        run.deadline = began + (end - began) * part.seconds / sum(p.seconds for p in open_[open_.index(part) :])
        if missing:
            verdicts[part.name] = f"not run: needs {', '.join(missing)}"
            continue
        if run.deadline - began < part.least:
            verdicts[part.name] = "not run: no time left; the next run begins with it"
            continue
        print(f"== {part.name}, at most {run.left():.0f} s", flush=True)
        try:
            outcome = part.run(run)
        except Exception as error:
            outcome = Outcome(False, [f"{type(error).__name__}: {error}"])
        took = f"{time.monotonic() - began:.0f} s"
        print("\n".join(f"   {line}" for line in outcome.lines), flush=True)
        if outcome.ok and part.sources is not None:
            stamp.write_text(f"{took}\n{run.key(part.sources)}\n")
        verdicts[part.name] = f"passed in {took}" if outcome.ok else f"FAILED after {took}"
    return verdicts


def main(arguments: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="stamps, logs, reports and the build")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="where figures and plots are kept")
    parser.add_argument("--only", default="", help=f"some of {','.join(p.name for p in parts)}, or tests, or sanitizer")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--again", action="store_true", help="also what passed before")
    parser.add_argument("--cutlass", help="folder of CUTLASS's headers")
    parser.add_argument("--revision", help="of the sources, where git cannot say it")
    given = parser.parse_args(arguments)
    try:
        selected = chosen(given.only, parts)
    except ValueError as error:
        parser.error(str(error))
    run = Run(given.out.resolve(), given.results.resolve(), given.cutlass, given.revision, gpu_here(), given.again)
    run.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # takes what is running along
    verdicts = check(run, selected, given.minutes, parts)
    width = max(map(len, verdicts))
    print("\n" + "\n".join(f"{name.ljust(width)}  {verdict}" for name, verdict in verdicts.items()))
    return 0 if all(v.startswith("passed") for v in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
