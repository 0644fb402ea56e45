"""Idle time of replicas that share out rollouts: each its equal part beforehand, against one queue.

    python -m bench.balance [--draws 3] [--visits 2] [--out bench/results/balance.json]

Real engines in gloo processes draw sequences whose lengths are prescribed, from a log-normal distribution with sigma 1: 0.9 of
it between prompts, 0.45 between visits and samples of a prompt; cut at 400, median 25. At the first visit of a draw's prompts
nothing is known of any length; at later ones the queue begins with the prompts whose completions were long before.

A step of an engine takes at least 20 ms, asleep for what it does not compute: as on a device, where a step reads all weights
whatever the batch, and so that processes that share cores do not slow one another. Idle is the mean share of its time that a
replica waits for the slowest; steps are those of the replica that takes the most.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastrlhf.generation import EmbeddedEngine, Fleet, Resharded, Sampling
from fastrlhf.generation.embedded.sequence import Sequence
from fastrlhf.models import Decoder, DecoderConfig
from fastrlhf.parallel import ParallelGroups

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """`samples` of each prompt; `draws` of new prompts, each visited `visits` times; `step`: seconds at least."""

    processes: int = 4
    sequences: int = 512
    samples: int = 8
    draws: int = 3
    visits: int = 2
    slots: int = 16
    most: int = 400
    step: float = 0.02


class Prescribed(EmbeddedEngine):
    """Ends the sequences of a prompt at given lengths, and takes its time for each step."""

    lengths: list[list[int]]
    step: float

    def _ends(self, sequence: Sequence, token: int) -> str:
        return "stop" if sequence.drawn >= self.lengths[sequence.prompt][sequence.sample] else ""

    def _forward(self, spans: Any) -> Any:
        begun = time.perf_counter()
        out = super()._forward(spans)
        time.sleep(max(0.0, self.step - (time.perf_counter() - begun)))
        return out


def lengths_of(case: Case, draw: int, visit: int) -> list[list[int]]:
    prompts = case.sequences // case.samples
    of_prompt = torch.randn(prompts, 1, generator=torch.Generator().manual_seed(99 + draw))
    within = torch.randn(prompts, case.samples, generator=torch.Generator().manual_seed(1000 * draw + visit))
    return (3.2 + 0.9 * of_prompt + 0.45 * within).exp().clamp(1, case.most).long().tolist()


def work(rank: int, case: Case, directory: str) -> None:
    torch.set_num_threads(1)
    world = case.processes
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    groups = ParallelGroups.create()
    model = Decoder(DecoderConfig.from_hf(CONFIG), groups=groups).initialize(0)
    engine = Prescribed(model, max_sequences=case.slots)
    engine.step = case.step
    rows = []
    fleets = {balance: Fleet(engine, groups, Resharded(model), balance=balance) for balance in (False, True)}
    for draw in range(case.draws):
        prompts = [[1 + draw, 1 + i // 60, 1 + i % 60] for i in range(case.sequences // case.samples)]
        for visit in range(case.visits):
            engine.lengths = lengths_of(case, draw, visit)
            for balance, fleet in fleets.items():
                assert fleet.resharded.replicas.size == world
                begun = time.perf_counter()
                fleet.generate(prompts, Sampling(n=case.samples, max_tokens=case.most), seeds=list(range(len(prompts))))
                seconds = time.perf_counter() - begun
                steps = torch.tensor(engine.stats.steps)
                dist.all_reduce(steps, dist.ReduceOp.MAX)
                rows.append({
                    "draw": draw, "visit": visit, "queue": balance, "idle": fleet.idle, "seconds": seconds, "steps": int(steps),
                })  # fmt: skip
    if rank == 0:
        Path(directory, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure(case: Case) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(work, (case, directory), nprocs=case.processes)
        return list(json.loads(Path(directory, "rows.json").read_text()))


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Means of both ways, and of the queue as a share of the other, by visit."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for visit, later in (("first", False), ("later", True)):
        chosen = [row for row in rows if (row["visit"] > 0) is later]
        if not chosen:
            continue
        found[visit] = {}
        for what in ("idle", "steps", "seconds"):
            static, queue = (mean(row[what] for row in chosen if row["queue"] is q) for q in (False, True))
            found[visit][what] = {"static": static, "queue": queue, "of static": queue / static if static else 1.0}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.balance", description=__doc__)
    for name in ("processes", "sequences", "samples", "draws", "visits", "slots"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Case, name))
    parser.add_argument("--out", type=Path)
    options = vars(parser.parse_args())
    out = options.pop("out")
    case = Case(**options)
    rows = measure(case)
    for row in rows:
        how = "queue " if row["queue"] else "static"
        print(
            f"draw {row['draw']}  visit {row['visit']}  {how}  idle {100 * row['idle']:5.1f} %  {row['steps']:4d} steps  "
            f"{row['seconds']:6.2f} s"
        )
    found = summary(rows)
    for visit, (idle, steps, seconds) in ((v, f.values()) for v, f in found.items()):
        print(
            f"{visit} visits: idle {100 * idle['static']:.1f} % -> {100 * idle['queue']:.1f} %, {idle['of static']:.2f} of "
            f"static (the bar is 0.5); {steps['of static']:.2f} of its steps, {seconds['of static']:.2f} of its time"
        )
    if out:
        out.write_text(json.dumps({"case": asdict(case), "rows": rows, "visits": found}, indent=1) + "\n")
    return 0 if all(visit["idle"]["of static"] < 0.5 for visit in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
