"""`fastrlhf refit plan` prints what a refit between two layouts copies; `fastrlhf refit check` compares an engine's files with
the contract its adapter was written for."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..refit.catalogue import PlanError
from ..refit.contract import ENGINES, check, load
from ..refit.cost import Cost, cost_of, places
from ..refit.layouts import KINDS, catalogue_for, layout
from ..refit.plan import Plan, make_plan
from ..refit.shapes import FAMILIES, model_of


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("fastrlhf refit", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="plan | check")
    plan = commands.add_parser("plan", help="what a refit between two layouts copies")
    plan.add_argument("--model", required=True, help=f"config.json or its folder; {', '.join(FAMILIES)}")
    plan.add_argument("--from", dest="source", required=True, help="the trainer's sizes, as tp8pp4, tp1pp16dp64ep64")
    plan.add_argument("--to", dest="dest", required=True, help="the engine's sizes, as tp4")
    plan.add_argument("--from-layout", default="megatron", choices=KINDS)
    plan.add_argument("--to-layout", default="engine", choices=KINDS)
    plan.add_argument("--gpus-per-node", type=int, default=8)
    plan.add_argument("--apart", action="store_true", help="the engine has GPUs of its own, after the trainer's")
    plan.set_defaults(run=_plan)
    contract = commands.add_parser("check", help="an engine's files against its recorded contract")
    contract.add_argument("engine", choices=ENGINES)
    contract.add_argument("--at", required=True, type=Path, help="site-packages, or a folder with an unpacked wheel")
    contract.set_defaults(run=_check)
    given = parser.parse_args(argv)
    return int(given.run(given))


def _plan(given: argparse.Namespace) -> int:
    path = Path(given.model)
    path = path / "config.json" if path.is_dir() else path
    if given.gpus_per_node < 1:
        raise UserError(f"gpus-per-node: expected >= 1, got {given.gpus_per_node}")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"model: {path}: {error}") from error
    try:
        model = model_of(config)
        a, b = layout(given.source, given.from_layout), layout(given.dest, given.to_layout)
        started = time.perf_counter()
        source = catalogue_for(model, a).at(places(a.ranks, given.gpus_per_node))
        dest = catalogue_for(model, b).at(places(b.ranks, given.gpus_per_node, a.ranks if given.apart else 0))
        plan = make_plan(source, dest)
        seconds = time.perf_counter() - started
    except PlanError as error:
        raise UserError(str(error)) from error
    print(report(plan, cost_of(plan), seconds))
    return 0


def report(plan: Plan, cost: Cost, seconds: float) -> str:
    parameters = int(plan.source.tensors.shape.prod(1).sum())
    lines = [
        f"{parameters / 1e9:.2f}B parameters in {len(plan.source.tensors):,} tensors; "
        f"{plan.source.ranks} ranks -> {plan.dest.ranks}",
        f"{cost.ops:,} copies, {cost.nbytes / 1e9:.2f} GB; every element of the destination is written once",
        f"planned in {seconds:.3f} s, digest {plan.digest[:16]}",
        f"the busiest source rank sends {cost.imbalance:.2f} x the mean of those that send",
        "",
        f"{'link':<10}{'GB':>12}{'busiest rank GB':>18}{'least ms':>12}",
        *(f"{x.name:<10}{x.nbytes / 1e9:>12.2f}{x.busiest / 1e9:>18.2f}{x.seconds * 1e3:>12.1f}" for x in cost.links),
        "",
        f"floor {cost.floor * 1e3:.1f} ms, at the rates of H100 machines: not a measurement",
    ]
    return "\n".join(lines)


def _check(given: argparse.Namespace) -> int:
    contract = load(given.engine)
    found = check(given.engine, given.at)
    for line in found:
        print(line)
    low, end = contract.versions
    verdict = "differs" if found else "is as recorded"
    print(f"{given.engine} in {given.at} {verdict}; recorded for {low} <= version < {end} from {contract.recorded}")
    return 1 if found else 0
