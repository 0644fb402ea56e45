"""What a plan costs: bytes over each kind of link, and the least time they take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .plan import Plan

# Bytes/s in one direction, of H100 machines: a copy within a GPU (3.35 TB/s for read and write), NVLink 4, a 400G NIC.
RATES = {"device": 1.67e12, "node": 450e9, "network": 50e9}


@dataclass(frozen=True)
class Link:
    """`busiest` is what the most loaded rank sends or receives over it; `seconds` that over the link's rate."""

    name: str
    nbytes: int
    busiest: int
    seconds: float


@dataclass(frozen=True)
class Cost:
    """`floor`: seconds below which no transport can be, if every link runs at its rate; links run side by side.
    `imbalance`: what the busiest source rank sends, over the mean of those that send."""

    ops: int
    nbytes: int
    links: tuple[Link, ...]
    floor: float
    imbalance: float
    table_bytes: int


def cost_of(plan: Plan, rates: dict[str, float] | None = None) -> Cost:
    """Ranks whose places are unknown are taken to be on different machines."""
    rates = RATES | (rates or {})
    source, dest = plan.source_rank, plan.dest_rank
    a, b = plan.source.places[source], plan.dest.places[dest]
    known = (a[:, 0] >= 0) & (a[:, 0] == b[:, 0])
    kind = np.where(known & (a[:, 1] == b[:, 1]), 0, np.where(known, 1, 2))
    links = []
    for i, name in enumerate(RATES):
        mine = kind == i
        out = np.bincount(source[mine], plan.nbytes[mine], minlength=plan.source.ranks)
        into = np.bincount(dest[mine], plan.nbytes[mine], minlength=plan.dest.ranks)
        busiest = int(max(out.max(initial=0), into.max(initial=0)))
        links.append(Link(name, int(plan.nbytes[mine].sum()), busiest, busiest / rates[name]))
    load = np.bincount(source, plan.nbytes, minlength=plan.source.ranks)
    used = load[load > 0]
    imbalance = float(used.max() / used.mean()) if used.size else 1.0
    return Cost(len(plan.ops), int(plan.nbytes.sum()), tuple(links), max(x.seconds for x in links), imbalance, plan.ops.nbytes)


def places(ranks: int, per_node: int, first: int = 0) -> list[tuple[int, int]]:
    """(node, device) of ranks that fill machines one after another, from device `first` on."""
    return [((first + i) // per_node, (first + i) % per_node) for i in range(ranks)]
