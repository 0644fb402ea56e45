"""scripts/gpu_check.py with parts that need no GPU."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "gpu_check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


g = load()


def parts(calls: list[str], failing: tuple[str, ...] = ()) -> list[Any]:
    def part(name: str) -> Any:
        def run(run: Any) -> Any:
            calls.append(name)
            if name in failing:
                raise RuntimeError("broke")
            return g.Outcome(True, [f"{name} ran"])

        return g.Part(name, run, 1.0, (), () if name == "build" else ("build",), least=0.0)

    return [part(name) for name in ("build", "tests", "bench")]


def test_parts_run_in_their_order_and_unknown_ones_are_named() -> None:
    assert [p.name for p in g.chosen("bench,build", g.PARTS)] == ["build", "bench"]
    suites = ["tests-gpu", "tests-triton", "tests-cuda"]
    tools = ["sanitizer-memcheck", "sanitizer-racecheck"]
    assert [p.name for p in g.chosen("", g.PARTS)] == ["build", *suites, *tools, "bench", "plots"]
    assert [p.name for p in g.chosen("tests,sanitizer-racecheck", g.PARTS)] == [*suites, tools[1]]
    with pytest.raises(ValueError, match="no part \\['speed'\\]"):
        g.chosen("speed", g.PARTS)


def test_a_failure_stops_nothing_and_only_what_passed_is_stamped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    arguments = ["--out", str(tmp_path / "out"), "--results", str(tmp_path)]
    assert g.main(arguments, parts(calls, failing=("tests",))) == 1
    assert calls == ["build", "tests", "bench"]
    out = capsys.readouterr().out
    assert "RuntimeError: broke" in out and "tests  FAILED after" in out and "bench  passed in" in out
    assert {p.name for p in (tmp_path / "out" / "stamps").iterdir()} == {"build", "bench"}
    assert g.main(arguments, parts(calls)) == 0 and calls[3:] == ["tests"]
    assert "build  passed before" in capsys.readouterr().out
    assert g.main([*arguments, "--only", "bench", "--again"], parts(calls)) == 0 and calls[4:] == ["bench"]


def test_a_part_that_fails_again_loses_its_stamp(tmp_path: Path) -> None:
    calls: list[str] = []
    arguments = ["--out", str(tmp_path), "--only", "build"]
    assert g.main(arguments, parts(calls)) == 0
    assert g.main([*arguments, "--again"], parts(calls, failing=("build",))) == 1
    assert not (tmp_path / "stamps" / "build").exists()


def test_without_time_nothing_starts_and_the_next_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    assert g.main(["--out", str(tmp_path), "--minutes", "-1"], parts(calls)) == 1 and not calls
    assert "build  not run: no time left" in capsys.readouterr().out
    assert g.main(["--out", str(tmp_path)], parts(calls)) == 0 and calls == ["build", "tests", "bench"]


def test_parts_that_need_a_build_are_not_run_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    assert g.main(["--out", str(tmp_path)], parts(calls, failing=("build",))) == 1 and calls == ["build"]
    assert "bench  not run: needs build" in capsys.readouterr().out
    assert g.main(["--out", str(tmp_path), "--only", "bench"], parts(calls)) == 1 and calls == ["build"]


def test_a_stamp_is_of_these_sources_and_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(g, "ROOT", tmp_path / "source")
    (g.ROOT / "src").mkdir(parents=True)
    (g.ROOT / "src" / "a.cu").write_text("1")
    part = g.Part("build", lambda run: g.Outcome(True), 1.0, ("src",), (), 0.0)

    def verdict(gpu: str = "a", cutlass: str | None = None) -> str:
        return g.check(g.Run(tmp_path, tmp_path, cutlass, gpu=gpu), [part], 1.0)["build"].split(" in ")[0].split(" (")[0]

    assert [verdict(), verdict()] == ["passed", "passed before"]
    (g.ROOT / "src" / "a.cu").write_text("2")
    assert [verdict(), verdict(), verdict("b"), verdict("b", "there")] == ["passed", "passed before", "passed", "passed"]


def test_what_a_part_leaves_goes_to_the_rest(tmp_path: Path) -> None:
    shares = []

    def run(run: Any) -> Any:
        shares.append(round(run.left()))
        return g.Outcome(True)

    parts = [g.Part(name, run, seconds, (), (), 0.0) for name, seconds in (("a", 150), ("b", 100), ("c", 50))]
    g.check(g.Run(tmp_path, tmp_path), parts, 5.0)
    assert shares == [150, 200, 300]


def test_eight_minutes_are_shared_out() -> None:
    """The default holds what every part is expected to take."""
    assert sum(p.seconds for p in g.PARTS) == 8 * 60
    assert all(p.least <= p.seconds for p in g.PARTS)


def test_a_command_that_takes_too_long_is_stopped_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = g.Run(tmp_path, tmp_path, deadline=time.monotonic() + 2)
    code = "import subprocess, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); subprocess.run(['sleep', '60'])"
    began = time.monotonic()
    assert run.call([sys.executable, "-c", code], "log", 1) == g.OUT_OF_TIME
    assert time.monotonic() - began < 20
    assert run.call([sys.executable, "-c", "print('here'); raise SystemExit(5)"], "log") == 5
    assert run.tail("log") == ["here"]


def test_what_is_tested_is_what_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/peers")
    path = g.Run(tmp_path, tmp_path).environment()["PYTHONPATH"].split(":")
    assert path == [str(tmp_path / "build" / "site"), str(g.ROOT), "/peers"]


def test_architectures() -> None:
    assert [g.architecture(*c) for c in ((8, 0), (8, 9), (9, 0), (10, 0))] == ["80", "89", "90a", "100a"]


def test_compile_times_come_from_ninjas_log(tmp_path: Path) -> None:
    log = "# ninja log v6\n0\t2500\t1\tCMakeFiles/_cuda.dir/kernels/gae/cuda.cu.o\tab\n0\t900\t1\tCMakeFiles/x.cpp.o\tcd\n"
    (tmp_path / ".ninja_log").write_text(log)
    assert g.nvcc_times(tmp_path) == "nvcc 2 s in 1 files, gae/cuda.cu.o 2"
    assert g.nvcc_times(tmp_path / "nothing") == "nvcc 0 s in 0 files"


def test_reports_of_tests(tmp_path: Path) -> None:
    file = tmp_path / "gpu.xml"
    file.write_text(
        "<testsuites><testsuite><testcase classname='tests.a' name='one'/><testcase classname='tests.a' name='two'>"
        "<failure message='assert 1 == 2&#10;more'/></testcase><testcase classname='tests.a' name='three'><skipped/></testcase>"
        "</testsuite></testsuites>"
    )
    assert g.junit(file) == ("1 passed, 1 failed, 1 skipped", ["  tests.a::two: assert 1 == 2"])
    assert g.junit(tmp_path / "nothing.xml") == ("", [])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("========= ERROR SUMMARY: 0 errors", ["0"]),
        ("========= ERROR SUMMARY: 1 error", ["1"]),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", ["2"]),
        ("========= Device not supported", []),
    ],
)
def test_summaries_of_the_sanitizer(text: str, found: list[str]) -> None:
    assert g.SUMMARY.findall(text) == found


def fake(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
    (tmp_path / name).chmod(0o755)


def test_the_sanitizer_part_reads_what_the_tool_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "compute-sanitizer", "[ $2 = memcheck ] && echo 'ERROR SUMMARY: 0 errors' || echo 'ERROR SUMMARY: 3 errors'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(g.sys, "executable", "/bin/true")
    assert g.sanitizer("memcheck")(g.Run(tmp_path, tmp_path)) == g.Outcome(True, ["cuda: 0 found", "triton: 0 found"])
    assert not g.sanitizer("racecheck")(g.Run(tmp_path, tmp_path)).ok


def test_the_benchmark_goes_on_in_a_new_process_after_a_lost_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = '{"rows": [{"op": "gae", "case": "c", "variant": "v", "skipped": "lost"}], "ceilings": {"copy": 3e12}}'
    fake(
        tmp_path,
        "python",
        f"echo '{rows}' > {tmp_path}/bench.json; [ -e {tmp_path}/twice ] && exit 0; touch {tmp_path}/twice; exit 3",
    )
    monkeypatch.setattr(g.sys, "executable", str(tmp_path / "python"))
    outcome = g.bench(g.Run(tmp_path, tmp_path))
    assert outcome.ok and outcome.lines == ["1 rows; copy 3 T/s", "skipped: gae c, v: lost"]
