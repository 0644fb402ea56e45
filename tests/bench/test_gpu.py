"""The GPU half of the benchmark, as far as it goes without one: its cases on small CPU tensors, its bars on made-up rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from bench import bars, gpu_cases, report
from bench.__main__ import main, measured_before
from bench.gpu import Rotation
from tests.gpu import calls


@pytest.fixture(autouse=True)
def _no_peers_and_nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cases.peers, "find", lambda module, name: None)
    monkeypatch.setattr(gpu_cases, "compiled", lambda function: function)


@pytest.mark.parametrize("suite", gpu_cases.SUITES)
def test_cases_compute_what_their_oracles_say(suite: str) -> None:
    seen = 0
    for case in gpu_cases.SUITES[suite](gpu_cases.Setting("cpu", short=True, ours=("cpu",))):
        exact = case.oracle() if case.oracle else None
        for variant in case.variants.values():
            variant.run()
            seen += 1
            if exact is not None and variant.value is not None:
                torch.testing.assert_close(variant.value().double(), exact, rtol=1e-2, atol=1e-4)
    assert seen


def test_each_of_our_backends_is_a_variant_where_the_op_has_it() -> None:
    setting = gpu_cases.Setting("cpu", short=True)
    assert list(next(gpu_cases.advantages(setting)).variants)[:2] == ["fastrlhf cuda", "fastrlhf triton"]
    assert "fastrlhf cuda" not in next(gpu_cases.draws(setting)).variants


def test_the_cases_are_the_lines_of_the_bars() -> None:
    """At full size, by name; nothing is allocated."""
    meta = gpu_cases.Setting("meta")
    suites = (
        gpu_cases.gpu_heads.forward,
        gpu_cases.scores,
        gpu_cases.trained,
        gpu_cases.losses_of_logits,
        gpu_cases.divergences,
        gpu_cases.policy_losses,
    )
    names = {f"{case.op} {case.name}" for suite in suites for case in suite(meta)}
    for shape in bars.LOGITS:
        assert f"logprobs forward + entropy {shape} bfloat16" in names
        assert f"{bars.ONE_READ} forward + backward {shape} bfloat16" in names
    assert f"linear_logprobs forward {bars.HEAD} bfloat16" in names
    assert {f"policy_loss {n} tokens, forward + backward + stats" for n in (8388608, 65536, 1048576)} <= names
    assert {f"kl_full {d} 4096x128256 bfloat16" for d in ("forward", "reverse")} <= names


def test_a_rotation_on_the_cpu_has_one_set() -> None:
    made = []
    rotation = Rotation(lambda: made.append(0) or (torch.ones(3),))
    assert rotation.take() is rotation.take() is rotation.first and len(made) == 1


def row(op: str, case: str, variant: str, median: float, **more: Any) -> dict[str, Any]:
    return {"op": op, "case": case, "variant": variant, "median_s": median, "host_s": 2e-5, "slower_than_ours": 1.0} | more


def lines_with(text: str, rows: list[dict[str, Any]], *tests: dict[str, Any]) -> list[str]:
    return [line for line in bars.table(rows, *tests).splitlines() if text in line]


def test_what_was_not_measured_is_said_to_be_so() -> None:
    assert all(line.endswith("not measured") for line in bars.table([]).splitlines())
    skipped = {"op": "gae", "case": "512x4096", "variant": "fastrlhf cuda", "skipped": "no memory"}
    assert lines_with("gae 512x4096", [skipped])[0].endswith("not measured")


def test_bars_take_the_fastest_of_ours() -> None:
    case = "forward + backward 8192x128256 bfloat16"
    floor = 4 * 8192 * 128256 / 3e12
    rows = [
        row(bars.ONE_READ, case, "fastrlhf cuda", 1.2 * floor, ceiling_GB_per_s=3000),
        row(bars.ONE_READ, case, "fastrlhf triton, op by op", 1.6 * floor, ceiling_GB_per_s=3000),
        row(bars.ONE_READ, case, "torch.compile", 1.7 * floor),
        row(bars.ONE_READ, case, "Liger, sum of the losses", 2.0 * floor),
    ]
    over, compiled, liger = lines_with("forward + backward 8192x128256", rows)
    assert "1.20x" in over and over.endswith("  holds")
    assert "1.42x" in compiled and compiled.endswith("does not hold")
    assert "1.67x" in liger and liger.endswith("  holds")


def test_a_launch_bound_op_is_judged_by_the_callers_time_too() -> None:
    case = "65536 tokens, forward + backward + stats"
    rows = [
        row("policy_loss", case, "fastrlhf cuda", 1e-5, host_s=5e-5),
        row("policy_loss", case, "torch eager", 2e-4, host_s=4e-4),
    ]
    device, whole = lines_with("policy_loss 64k", rows)
    assert "20.00x" in device and "8.00x" in whole and whole.endswith("does not hold")


def test_the_slowest_call_and_the_tests_count() -> None:
    rows = [row("call", "gae", "fastrlhf", 1e-6), row("call", "sample", "fastrlhf", 1e-6, host_s=3.5e-5)]
    rows.append(row("call", "gae", "fastrlhf triton", 1e-6, host_s=1e-3))
    assert "35.0 us" in lines_with("call time", rows)[0]
    tests = {f"gpu::tests.gpu.test_device::test_graph[{n}]": n != "kl-triton" for n in ("gae-cuda", "kl-triton")}
    assert "50%" in lines_with("CUDA graph", [], tests)[0]


def test_a_run_that_did_not_end_holds_nothing() -> None:
    """All cases that there are must have passed; one that failed decides. Other suites' tests of the same name do not count."""
    tests = {f"gpu::tests.gpu.test_device::test_same_bits[{n}]": True for n in "ab"}
    other = {"gpu::tests.gpu.test_linear_logprobs_sm90::test_same_bits[c]": True}
    assert lines_with("bitwise", [], tests, {"test_same_bits": 2})[0].endswith("  holds")
    assert lines_with("bitwise", [], tests | other, {"test_same_bits": 3})[0].endswith("not measured")
    failed = {"gpu::tests.gpu.test_device::test_same_bits[c]": False}
    assert lines_with("bitwise", [], tests | failed, {"test_same_bits": 9})[0].endswith("does not hold")


def test_every_test_that_a_bar_counts_has_cases() -> None:
    counts = bars.expected()
    assert counts["test_graph"] > 90 and counts["test_one_launch"] == 2
    assert {"logits_policy_loss_128256", "logprobs_128256"} <= {n for _, n in calls.TESTS["test_same_bits"]}


def test_flagship_calls_have_rows_on_16_bytes() -> None:
    for name, call in calls.CALLS.items():
        if name.endswith(("_128256", "_1000", "_no_entropy")):
            x = call.make(calls.Maker("cpu"))["logits"]
            assert x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0, name


def test_outcomes_of_tests_are_read_from_junit(tmp_path: Any) -> None:
    file = tmp_path / "gpu.xml"
    file.write_text(
        "<testsuites><testsuite><testcase classname='t.d' name='test_graph[a]'/><testcase classname='t.d' name='test_graph[b]'>"
        "<failure message='x'/></testcase><testcase name='test_graph[c]'><skipped/></testcase></testsuite></testsuites>"
    )
    other = tmp_path / "cuda.xml"
    other.write_text("<testsuite><testcase classname='t.d' name='test_graph[b]'/></testsuite>")
    assert bars.outcomes([file, other]) == {
        "gpu::t.d::test_graph[a]": True, "gpu::t.d::test_graph[b]": False, "cuda::t.d::test_graph[b]": True
    }  # fmt: skip


def test_only_rows_of_the_same_gpu_and_sources_are_known(tmp_path: Any) -> None:
    machine = {"gpu": "a GPU", "revision": "abc", "sources": "1"}
    rows = [
        {"op": "gae", "case": "a", "variant": "fastrlhf cuda", "median_s": 1.0},
        {"op": "gae", "case": "b", "variant": "fastrlhf cuda", "skipped": "no memory"},
        {"op": "gae", "case": "b", "variant": "torch", "median_s": 1.0},
        {"op": "kl", "case": "c", "variant": "verl", "skipped": "no"},
    ]
    file = tmp_path / "gpu.json"
    assert measured_before(file, machine, False) == []
    file.write_text(json.dumps({"machine": machine, "rows": rows}))
    assert measured_before(file, machine, False) == [rows[0], rows[3]]
    assert measured_before(file, machine, True) == rows
    for other in ({"gpu": "another"}, {"revision": "def"}, {"sources": "2"}):
        assert measured_before(file, machine | other, True) == []


def test_without_git_there_is_no_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(report.subprocess, "run", missing)
    assert report.machine()["revision"] == "unknown"


def test_results_print_and_draw(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row("gae", "512x4096", "fastrlhf cuda", 2e-5, p20_s=2e-5, p80_s=2e-5, of_floor=0.7, GB_per_s=2100.0, max_error=1e-6),
        row("gae", "512x4096", "torch loop", 2e-1, p20_s=2e-1, p80_s=2e-1, slower_than_ours=1e4),
    ]
    report.print_case(rows)
    assert "20.0 us" in capsys.readouterr().out.splitlines()[-1]
    file = tmp_path / "gpu.json"
    report.save(file, {"copy": 3e12}, rows, {"gpu": "a GPU", "revision": "abc"})
    assert json.loads(file.read_text())["machine"]["revision"] == "abc"
    assert report.markdown(file).startswith("a GPU, ")
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "a.png", rows)
    report.plot_floor(tmp_path / "b.png", rows)
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "--device", "cuda"])
    assert main() == 1 and "no GPU here" in capsys.readouterr().out


def test_the_head_is_judged_by_the_matrix_rate_and_by_memory() -> None:
    """Its share comes from operations; memory counts without the gradients."""
    case, loss = f"forward {bars.HEAD} bfloat16", f"forward + backward {bars.HEAD} bfloat16"
    gradients = 4 * 128256 * 4096 + 2 * 8192 * 4096
    rows = [
        row("linear_logprobs", case, "fastrlhf cuda", 0.012, of_floor=0.9, peak_extra_bytes=int(2e7)),
        row("linear_logprobs", case, "verl linear_cross_entropy", 0.020),
        row("linear_policy_loss", loss, "fastrlhf cuda", 0.04, of_floor=0.7, peak_extra_bytes=int(gradients + 6e8)),
    ]
    share, verl, memory = lines_with(f"linear_logprobs forward {bars.HEAD}", rows)
    assert "90%" in share and share.endswith("  holds")
    assert "1.67x" in verl and verl.endswith("does not hold")
    assert "0.02 GB" in memory and memory.endswith("  holds")
    share, verl, memory = lines_with(f"linear_policy_loss {bars.HEAD}", rows)
    assert share.endswith("does not hold") and verl.endswith("not measured")
    assert "0.60 GB" in memory and memory.endswith("does not hold")
