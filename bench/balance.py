"""Idle time of replicas that share out rollouts: each its equal part beforehand, against one queue.

    python -m bench.balance [--processes 4] [--sequences 1024] [--samples 8] [--rounds 3] [--out bench/results/balance.json]

Real engines in gloo processes draw sequences whose lengths are prescribed, from a log-normal distribution with sigma 1: 0.9 of
it between prompts, 0.45 between visits and samples of a prompt; cut at 400, median 25. In the first round nothing is known of
any length; in the others the queue begins with the prompts whose completions were long in the round before.

A step of an engine takes at least 20 ms, asleep for what it does not compute: as on a device, where a step reads all weights
whatever the batch, and so that processes that share cores do not slow one another. Idle is the mean share of its time that a
replica waits for the slowest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
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

STEP = 0.02
SLOTS = 16
MOST = 400
CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip


class Prescribed(EmbeddedEngine):
    """Ends the sequences of a prompt at given lengths, and takes its time for each step."""

    lengths: list[list[int]]

    def _ends(self, sequence: Sequence, token: int) -> str:
        return "stop" if sequence.drawn >= self.lengths[sequence.prompt][sequence.sample] else ""

    def _forward(self, spans: Any) -> Any:
        begun = time.perf_counter()
        out = super()._forward(spans)
        time.sleep(max(0.0, STEP - (time.perf_counter() - begun)))
        return out


def lengths_of(prompts: int, n: int, round_: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(round_)
    of_prompt = torch.randn(prompts, 1, generator=torch.Generator().manual_seed(99))
    drawn = (3.2 + 0.9 * of_prompt + 0.45 * torch.randn(prompts, n, generator=generator)).exp().clamp(1, MOST)
    return drawn.long().tolist()


def work(rank: int, world: int, prompts: int, n: int, rounds: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
    model = Decoder(DecoderConfig.from_hf(CONFIG)).initialize(0)
    groups = ParallelGroups.create()
    tokens = [[1 + i % 60, 2, 3] for i in range(prompts)]
    rows = []
    engine = Prescribed(model, max_sequences=SLOTS)
    fleets = {balance: Fleet(engine, groups, Resharded(model), balance=balance) for balance in (False, True)}
    for round_ in range(rounds):
        for balance, fleet in fleets.items():
            engine.lengths = lengths_of(prompts, n, round_)
            begun = time.perf_counter()
            fleet.generate(tokens, Sampling(n=n, max_tokens=MOST), seeds=list(range(prompts)))
            seconds = time.perf_counter() - begun
            rows.append({"round": round_, "queue": balance, "idle": fleet.idle, "seconds": seconds})
    if rank == 0:
        Path(directory, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure(processes: int, sequences: int, samples: int, rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(work, (processes, sequences // samples, samples, rounds, directory), nprocs=processes)
        return list(json.loads(Path(directory, "rows.json").read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.balance", description=__doc__)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = measure(options.processes, options.sequences, options.samples, options.rounds)
    for row in rows:
        how = "queue " if row["queue"] else "static"
        print(f"round {row['round']}  {how}  idle {100 * row['idle']:5.1f} %  {row['seconds']:6.2f} s")
    found: dict[str, dict[str, float]] = {}
    for visit, later in (("first", False), ("later", True)):
        chosen = [row for row in rows if (row["round"] > 0) is later]
        if not chosen:
            continue
        idle, seconds = (
            [mean(r[what] for r in chosen if r["queue"] is q) for q in (False, True)] for what in ("idle", "seconds")
        )
        found[visit] = {"static": idle[0], "queue": idle[1], "of static": idle[1] / idle[0], "time": seconds[1] / seconds[0]}
        print(
            f"{visit} visits: idle {100 * idle[0]:.1f} % -> {100 * idle[1]:.1f} %, {idle[1] / idle[0]:.2f} of static"
            f" (the bar is 0.5); {seconds[1] / seconds[0]:.2f} of its time"
        )
    if options.out:
        options.out.write_text(json.dumps({"rows": rows, "visits": found}, indent=1) + "\n")
    return 0 if all(visit["of static"] < 0.5 for visit in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
