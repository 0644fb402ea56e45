"""Whole jobs against what people use: the generation engine against transformers, a GRPO step against TRL.

    python -m bench.end_to_end --data ../shared/data/gsm8k/train.jsonl [--out bench/results/end-to-end-cpu.json]

One checkpoint for all: 4 layers, 128 wide, vocabulary 8192, random weights, its tokenizer trained on the questions. Both
sides take turns, so that what slows one slows the other; figures are medians of the turns and of the ratios within a turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fastrlhf.algorithms.grpo import GroupRelative, GRPOConfig
from fastrlhf.cli.main import main as fastrlhf
from fastrlhf.config import load
from fastrlhf.data import load_tokenizer, open_rows
from fastrlhf.generation import EmbeddedEngine, Sampling
from fastrlhf.models import load_decoder
from fastrlhf.training.loop import prepare
from fastrlhf.training.progress import Silent

PROMPTS, NEW, GROUPS, GROUP = 128, 128, 8, 8


def make_checkpoint(data: Path, directory: Path) -> Path:
    """The model and tokenizer that both sides load."""
    status = fastrlhf([
        "init", "--output", str(directory), "--data", str(data), "--fields", "question", "--vocab_size", "8192",
        "--model.hidden_size", "128", "--model.intermediate_size", "512", "--model.num_hidden_layers", "4",
        "--model.num_attention_heads", "4", "--model.max_position_embeddings", "1024",
    ])  # fmt: skip
    assert status == 0
    return directory


def length(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that costs nothing and differs between completions."""
    return [len(c) / 1000 for c in completions]


def generation(checkpoint: Path, data: Path, turns: int) -> dict[str, Any]:
    """Tokens a second of 128 prompts of mixed lengths, 128 new tokens each, and with lengths drawn by an end token."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(checkpoint)
    questions = [tokenizer.encode(open_rows(data)[i]["question"]) for i in range(PROMPTS)]
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    engine = EmbeddedEngine(load_decoder(checkpoint))
    longest = max(map(len, questions))
    ids = torch.full((PROMPTS, longest), tokenizer.pad_token_id)
    seen = torch.zeros(PROMPTS, longest, dtype=torch.int64)
    for i, q in enumerate(questions):
        ids[i, longest - len(q) :], seen[i, longest - len(q) :] = torch.tensor(q), 1

    def hf() -> int:
        with torch.inference_mode():
            out = theirs.generate(
                ids, attention_mask=seen, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True, top_k=0, temperature=1.0,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        return out[:, longest:].numel()

    def ours() -> int:
        return sum(len(c[0].tokens) for c in engine.generate(questions, Sampling(max_tokens=NEW)))

    seconds: dict[str, list[float]] = {"fastrlhf": [], "transformers": []}
    for turn in range(turns + 1):
        for name, run in (("fastrlhf", ours), ("transformers", hf)):
            start = time.perf_counter()
            tokens = run()
            if turn:  # the first warms
                seconds[name].append((time.perf_counter() - start) / tokens)
    return summary("generate, tokens/s", {n: [1 / s for s in t] for n, t in seconds.items()}, "transformers", faster=True)


class Ours:
    """Our GRPO steps, in a process of their own: `fastrlhf train` sets malloc, which would speed up TRL as well."""

    def __init__(self, checkpoint: Path, data: Path) -> None:
        words = [sys.executable, "-m", "bench.end_to_end", "--data", str(data), "--steps_of", str(checkpoint)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, float]:
        """Seconds of a step, as a whole and of its phases."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


def steps_of(checkpoint: Path, data: Path) -> None:
    """A GRPO step for each line that comes in: 8 questions with 8 completions of up to 128 tokens."""
    words = [
        "--run.directory", tempfile.mkdtemp(), "--model.path", str(checkpoint), "--data.path", str(data),
        "--data.prompt_field", "question", "--rewards", '[{"function": "bench.end_to_end:length"}]', "--steps", "1000",
        "--prompts_per_step", str(GROUPS), "--completions_per_prompt", str(GROUP), "--sampling.max_tokens", str(NEW),
        "--update.optimizer.lr", "1e-5", "--kl.coef", "0.04",
    ]  # fmt: skip
    config = load(GRPOConfig, None, words)
    prepare(config.run)
    algorithm = GroupRelative(config)
    for step, _ in enumerate(sys.stdin, 1):
        algorithm.timers.pop()
        start = time.perf_counter()
        algorithm.step(step, Silent())
        whole = time.perf_counter() - start
        phases = {k.removeprefix("seconds/"): v for k, v in algorithm.timers.pop().items() if k.startswith("seconds/")}
        print(json.dumps(phases | {"step": whole}), flush=True)


def grpo(checkpoint: Path, data: Path, turns: int) -> dict[str, Any]:
    """Seconds of a GRPO step, KL to the reference in the loss, each side as its users run it."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig as TheirConfig
    from trl import GRPOTrainer

    scratch = Path(tempfile.mkdtemp())
    ours = Ours(checkpoint, data)
    phases: list[dict[str, float]] = []
    seconds: dict[str, list[float]] = {"fastrlhf": [], "TRL": []}

    class Turns(TrainerCallback):  # type: ignore[misc]
        """After each of TRL's steps, one of ours."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds["TRL"].append(time.perf_counter() - self.start)
            phases.append(ours.step())
            seconds["fastrlhf"].append(phases[-1]["step"])

    rows = open_rows(data)
    trainer = GRPOTrainer(
        model=str(checkpoint),
        reward_funcs=length,
        args=TheirConfig(
            output_dir=str(scratch / "trl"),
            per_device_train_batch_size=GROUPS * GROUP,
            num_generations=GROUP,
            max_completion_length=NEW,
            beta=0.04,
            learning_rate=1e-5,
            max_steps=turns + 1,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            temperature=1.0,
            top_k=0,
            report_to="none",
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            lr_scheduler_type="constant",
        ),
        train_dataset=Dataset.from_list([{"prompt": rows[i]["question"]} for i in range(400)]),
        processing_class=load_tokenizer(checkpoint),
        callbacks=[Turns()],
    )
    trainer.train()
    ours.close()
    out = summary("GRPO step, s", {n: t[1:] for n, t in seconds.items()}, "TRL", faster=False)
    whole = statistics.median(p["step"] for p in phases[1:])
    out["share_of_phase"] = {k: statistics.median(p[k] for p in phases[1:]) / whole for k in phases[-1] if k != "step"}
    return out


def summary(what: str, figures: dict[str, list[float]], other: str, *, faster: bool) -> dict[str, Any]:
    medians = {n: statistics.median(f) for n, f in figures.items()}
    pairs = [a / b if faster else b / a for a, b in zip(figures["fastrlhf"], figures[other], strict=True)]
    print(
        f"{what}: " + ", ".join(f"{n} {m:.4g}" for n, m in medians.items()) + f"; {statistics.median(pairs):.2f}x {other}",
        flush=True,
    )
    return {"what": what, "medians": medians, "turns": figures, "times_faster": statistics.median(pairs)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="GSM8K's train.jsonl")
    parser.add_argument("--only", default="generation,grpo")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps_of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps_of:
        steps_of(arguments.steps_of, arguments.data)
        return 0
    suites: dict[str, Callable[[Path, Path, int], dict[str, Any]]] = {"generation": generation, "grpo": grpo}
    results = []
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = make_checkpoint(arguments.data, Path(directory) / "model")
        for name in arguments.only.split(","):
            results.append(suites[name](checkpoint, arguments.data, arguments.turns))
            for phase, share in results[-1].get("share_of_phase", {}).items():
                print(f"  {phase.ljust(12)} {share:6.1%}")
    if arguments.out:
        from importlib.metadata import version

        versions = {n: version(n) for n in ("torch", "transformers", "trl")}
        arguments.out.write_text(
            json.dumps({"versions": versions, "threads": torch.get_num_threads(), "results": results}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
