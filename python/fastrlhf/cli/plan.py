"""`fastrlhf plan`: what fits on so many GPUs, how, and about how long a step takes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..models import DecoderConfig
from ..ops.paged_attention import BLOCK
from ..training.plan import GPUS, Job, Plan, plans
from ..training.proof import proof


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("fastrlhf plan", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="config.json, or a directory with one")
    parser.add_argument("--gpus", required=True, type=int, help="processes, one a GPU")
    parser.add_argument("--gpu", default="h100", choices=sorted(GPUS), help="which GPU")
    parser.add_argument("--algorithm", default="ppo", choices=("sft", "reward", "grpo", "ppo"))
    parser.add_argument("--completions", type=int, default=512, help="sequences of a step")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--completion-tokens", type=int, default=512)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--minibatch-size", type=int, help="sequences of an optimizer's step; all of them where not given")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the sequences of a step")
    parser.add_argument("--max-sequences", type=int, default=256, help="in a replica's generation batch")
    parser.add_argument("--cache-tokens", type=int, help="positions of the engine's cache; where not given what a step needs, "
                        "2 GiB at most")  # fmt: skip
    parser.add_argument("--reward-models", type=int, default=0, help="how many score completions, of the model's size")
    parser.add_argument("--reward-model", type=Path, action="append", default=[], help="config.json of one of another size")
    parser.add_argument("--interleave", type=int, default=1, help="chunks of layers a pipeline process has")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations instead of computing them again")
    parser.add_argument("--all", action="store_true", help="also the layouts that do not fit")
    parser.add_argument("--prove", metavar="TPxPPxDP", help="shard the model on the meta device and count every element")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(list(argv))
    config = _read(options.model)
    positive = ("gpus", "completions", "prompt_tokens", "completion_tokens", "micro_batch_tokens", "minibatch_size", "epochs",
                "max_sequences", "interleave")  # fmt: skip
    for name in positive:
        if (given := getattr(options, name)) is not None and given < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected >= 1, got {given}")
    if options.prove:
        print(proof(config, *_sizes(options.prove, options.gpus), interleave=options.interleave))
        return 0
    rewards = [config] * options.reward_models + [_read(path, "--reward-model") for path in options.reward_model]
    job = Job(
        algorithm=options.algorithm, completions=options.completions, prompt_tokens=options.prompt_tokens,
        completion_tokens=options.completion_tokens, micro_batch_tokens=options.micro_batch_tokens,
        minibatch=options.minibatch_size and min(options.minibatch_size, options.completions), epochs=options.epochs,
        max_sequences=options.max_sequences, cache_tokens=options.cache_tokens, rewards=tuple(rewards),
        checkpointing=not options.no_checkpointing, interleave=options.interleave,
    )  # fmt: skip
    if job.cache_tokens is not None and job.cache_tokens < job.context + BLOCK:
        raise UserError(f"--cache-tokens: {job.cache_tokens} do not hold a sequence of {job.context} tokens")
    if job.rewards and not job.generates:
        raise UserError(f"--reward-models: {job.algorithm} has none")
    found = plans(config, options.gpus, GPUS[options.gpu], job)
    shown = found if options.all else [p for p in found if p.fits]
    if options.json:
        print(json.dumps([p.to_dict() for p in shown], indent=1))
    else:
        print(render(config, options.gpus, options.gpu, job, shown, len(found)))
    return 0


def render(config: DecoderConfig, gpus: int, gpu: str, job: Job, shown: list[Plan], count: int) -> str:
    title = (
        f"{config.model_type}, {Plan.parameters(config) / 1e9:.1f}e9 weights, {job.algorithm} on {gpus} x {gpu} "
        f"({GPUS[gpu].memory / 2**30:.0f} GiB); {job.completions} sequences of {job.prompt_tokens} + {job.completion_tokens} "
        f"tokens a step{_extras(job)}. Computed, not measured: see docs/scaling.md."
    )
    if not shown:
        return f"{title}\nnone of the {count} legal layouts fits; --all shows them"
    names = list(shown[0].memory)
    head = ["tp", "pp", "dp", *names, "peak", "fits", "bubble", "reshard", "s/step"]
    rows = [
        [str(p.tp), str(p.pp), str(p.dp), *(f"{p.memory[n] / 2**30:.1f}" for n in names), f"{p.peak / 2**30:.1f}",
         "yes" if p.fits else "no", f"{100 * p.bubble:.0f}%", "yes" if p.reshard else "no",
         f"{p.seconds:.1f}"] for p in shown
    ]  # fmt: skip
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join([title, "GiB a process:", *lines])


def _extras(job: Job) -> str:
    updates = f", {job.updates} updates" if job.updates > 1 else ""
    return updates + (f", {len(job.rewards)} reward model(s)" if job.rewards else "")


def _read(path: Path, option: str = "--model") -> DecoderConfig:
    file = path / "config.json" if path.is_dir() else path
    try:
        return DecoderConfig.from_hf(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {file}: {error}") from None


def _sizes(text: str, gpus: int) -> tuple[int, int, int]:
    try:
        tp, pp, dp = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise UserError(f"--prove: expected three sizes such as 8x2x4, got {text!r}") from None
    if tp * pp * dp != gpus:
        raise UserError(f"--prove: {tp} x {pp} x {dp} is {tp * pp * dp}, not the {gpus} of --gpus")
    return tp, pp, dp
