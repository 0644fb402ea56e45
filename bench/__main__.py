"""python -m bench --device cpu [--short] [--only logprobs,gae] [--seconds 2] [--out bench/results/cpu.json]
python -m bench tune [--only logprobs.forward,...] [--dry]   on a GPU: the tiles of the Triton kernels"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import call_cost, gae, kl, logprobs, masked_stats, policy_loss, report, sampling, tune
from .floor import ceilings
from .harness import measure, quiet

SUITES = {
    "call_cost": call_cost, "logprobs": logprobs, "kl": kl, "gae": gae, "masked_stats": masked_stats,
    "policy_loss": policy_loss, "sampling": sampling,
}  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["tune"]:
        return tune.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m bench", description="fastrlhf's operations against what people use")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--short", action="store_true", help="small inputs: does everything run?")
    parser.add_argument("--only", default="", help="some of " + ",".join(SUITES))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each variant of a case")
    parser.add_argument("--out", type=Path, help="JSON; a plot is written beside it")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(SUITES)
    unknown = set(names) - set(SUITES)
    if unknown:
        parser.error(f"--only: no suite {sorted(unknown)}; there are {list(SUITES)}")
    seconds = min(arguments.seconds, 0.1) if arguments.short else arguments.seconds
    rows = []
    with quiet():
        limits = ceilings(5 if arguments.short else 15)
        print(f"memory: read {limits['read'] / 1e9:.1f} GB/s, copy {limits['copy'] / 1e9:.1f} GB/s")
        for name in names:
            for case in SUITES[name].cases(arguments.short):
                results = measure(case, seconds)
                report.print_case(results)
                rows += results
    if arguments.out:
        report.save(arguments.out, limits, rows)
        report.plot(arguments.out.with_suffix(".png"), rows)
    broken = [r for r in rows if "skipped" in r and r["variant"].startswith("fastrlhf")]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
