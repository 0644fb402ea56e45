"""Whole jobs against what people use: the generation engine against transformers, a GRPO step against TRL.

    python -m bench.end_to_end --data ../shared/data/gsm8k/train.jsonl [--out bench/results/end-to-end-cpu.json]

One checkpoint for all: 4 layers, 128 wide, vocabulary 8192, random weights, its tokenizer trained on the questions. Both
sides take turns in one process, so that what slows one slows the other; figures are medians of the turns and ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
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
from fastrlhf.training.memory import keep_freed_memory
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


def grpo(checkpoint: Path, data: Path, turns: int) -> dict[str, Any]:
    """Seconds of a GRPO step: 8 questions with 8 completions of up to 128 tokens, KL to the reference in the loss."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig as TheirConfig
    from trl import GRPOTrainer

    scratch = Path(tempfile.mkdtemp())
    ours = GroupRelative(load(GRPOConfig, None, [
        "--run.directory", str(scratch / "ours"), "--model.path", str(checkpoint), "--data.path", str(data),
        "--data.prompt_field", "question", "--rewards", '[{"function": "bench.end_to_end:length"}]', "--steps", "100",
        "--prompts_per_step", str(GROUPS), "--completions_per_prompt", str(GROUP), "--sampling.max_tokens", str(NEW),
        "--update.optimizer.lr", "1e-5", "--kl.coef", "0.04",
    ]))  # fmt: skip
    keep_freed_memory()  # as `fastrlhf train` does; in this process TRL has it too
    phases: list[dict[str, float]] = []
    seconds: dict[str, list[float]] = {"fastrlhf": [], "TRL": []}

    class Turns(TrainerCallback):  # type: ignore[misc]
        """After each of TRL's steps, one of ours."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds["TRL"].append(time.perf_counter() - self.start)
            ours.timers.pop()
            start = time.perf_counter()
            ours.step(len(phases) + 1, Silent())
            seconds["fastrlhf"].append(time.perf_counter() - start)
            phases.append(ours.timers.pop())

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
    out = summary("GRPO step, s", {n: t[1:] for n, t in seconds.items()}, "TRL", faster=False)
    shares = {k.removeprefix("seconds/"): [p[k] for p in phases[1:]] for k in phases[-1] if k.startswith("seconds/")}
    whole = statistics.median(shares["step"])
    out["share_of_phase"] = {k: statistics.median(v) / whole for k, v in shares.items() if k != "step"}
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
    arguments = parser.parse_args()
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
