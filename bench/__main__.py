"""python -m bench --device cpu [--short] [--only logprobs,gae] [--case float32] [--seconds 2] [--out bench/results/cpu.json]
python -m bench --device cuda [--minutes 8] [--out gpu.json]: cases that the file already has are not measured again.
python -m bench tune [--only logprobs.forward,...] [--dry]   on a GPU: the tiles of the Triton kernels"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import (
    bars,
    call_cost,
    gae,
    gpu,
    gpu_cases,
    kl,
    linear_logprobs,
    logprobs,
    masked_stats,
    memory,
    policy_loss,
    report,
    sampling,
    tune,
)
from .floor import ceilings
from .harness import OURS, measure, quiet

SUITES = {
    "call_cost": call_cost, "logprobs": logprobs, "linear_logprobs": linear_logprobs, "kl": kl, "gae": gae,
    "masked_stats": masked_stats, "policy_loss": policy_loss, "sampling": sampling,
}  # fmt: skip


DEVICE_LOST = 3  # exit code: this process cannot go on, another one can


def main() -> int:
    if sys.argv[1:2] == ["tune"]:
        return tune.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m bench", description="fastrlhf's operations against what people use")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--short", action="store_true", help="small inputs: does everything run?")
    parser.add_argument("--only", default="", help=f"some of {','.join(SUITES)}; on a GPU of {','.join(gpu_cases.SUITES)}")
    parser.add_argument("--case", default="", help="on the CPU: only cases with this in their name")
    parser.add_argument("--samples", type=int, default=3, help="on the CPU: at least so many of each variant, however slow")
    parser.add_argument("--seconds", type=float, help="for each variant of a case; 2, on a GPU 0.3")
    parser.add_argument("--minutes", type=float, default=1e9, help="on a GPU: start no case after so long")
    parser.add_argument("--revision", help="of the sources, where git cannot say it")
    parser.add_argument("--sources", help="what is measured: on a GPU, rows of other sources or of another GPU are dropped")
    parser.add_argument("--keep-skipped", action="store_true", help="do not try again what failed before")
    parser.add_argument("--out", type=Path, help="JSON; plots are written beside it")
    arguments = parser.parse_args()
    suites = SUITES if arguments.device == "cpu" else gpu_cases.SUITES
    names = arguments.only.split(",") if arguments.only else list(suites)
    unknown = set(names) - set(suites)
    if unknown:
        parser.error(f"--only: no suite {sorted(unknown)}; there are {list(suites)}")
    with quiet():
        return on_cpu(names, arguments) if arguments.device == "cpu" else on_gpu(names, arguments)


def on_cpu(names: list[str], arguments: argparse.Namespace) -> int:
    seconds = arguments.seconds or 2.0
    seconds = min(seconds, 0.1) if arguments.short else seconds
    rows = []
    limits = ceilings(5 if arguments.short else 15)
    print(f"memory: read {limits['read'] / 1e9:.1f} GB/s, copy {limits['copy'] / 1e9:.1f} GB/s")
    for name in names:
        for number, case in enumerate(SUITES[name].cases(arguments.short)):
            if arguments.case not in case.name:
                case.after()
                continue
            # of 64 tokens there is no memory to speak of, and a process for each would take longer than they do
            peaks = {} if name == "call_cost" else memory.peaks(name, number, arguments.short)
            results = measure(case, seconds, peaks, arguments.samples)
            report.print_case(results)
            rows += results
    if arguments.out:
        report.save(arguments.out, limits, rows)
        report.plot(arguments.out.with_suffix(".png"), rows)
    return failed(rows)


def on_gpu(names: list[str], arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("no GPU here: python -m bench --device cpu measures the CPU kernels")
        return 1
    deadline = time.monotonic() + 60 * arguments.minutes
    device = torch.device("cuda", torch.cuda.current_device())
    extra = gpu.describe(device) | {k: getattr(arguments, k) for k in ("revision", "sources") if getattr(arguments, k)}
    limits = gpu.ceilings(device)
    print(f"{extra['gpu']}: " + ", ".join(f"{name} {rate / 1e12:.3g} T/s" for name, rate in limits.items()), flush=True)
    rows = measured_before(arguments.out, report.machine() | extra, arguments.keep_skipped) if arguments.out else []
    known = {(r["op"], r["case"]) for r in rows}
    setting = gpu_cases.Setting(device, arguments.short)
    late = []
    for name in names:
        if time.monotonic() > deadline:
            late.append(name)
            continue
        for case in gpu_cases.SUITES[name](setting):
            if (case.op, case.name) in known:
                continue
            if time.monotonic() > deadline:
                late.append(f"{case.op} {case.name}")
                continue
            lost = False
            try:
                results = gpu.measure_or_say_why(case, arguments.seconds or 0.3, limits)
            except gpu.DeviceLost as error:
                results, lost = error.rows, True
            report.print_case(results)
            rows += results
            if arguments.out:
                report.save(arguments.out, limits, rows, extra)
            if lost:
                print(f"{case.op} {case.name}: the device is lost to this process")
                return DEVICE_LOST
    print("\n" + bars.table(rows))
    if late:
        print("\nnot measured for want of time: " + "; ".join(late))
    return failed(rows) or bool(late)


def measured_before(file: Path, machine: dict[str, Any], keep_skipped: bool) -> list[dict[str, Any]]:
    """The rows of a file that need no measuring again: of the same GPU and sources, of cases in which none of ours failed."""
    if not file.exists():
        return []
    data = json.loads(file.read_text())
    if any(data["machine"].get(k) != machine.get(k) for k in ("gpu", "revision", "sources")):
        return []
    again = {(r["op"], r["case"]) for r in data["rows"] if "skipped" in r and r["variant"].startswith(OURS)}
    return [r for r in data["rows"] if keep_skipped or (r["op"], r["case"]) not in again]


def failed(rows: list[dict[str, Any]]) -> int:
    return 1 if any("skipped" in r and r["variant"].startswith(OURS) for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
