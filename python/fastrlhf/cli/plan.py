"""`fastrlhf plan`: what fits on so many GPUs, how, and about how long a step takes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..models import DecoderConfig
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
    parser.add_argument("--max-sequences", type=int, default=256, help="in a replica's generation batch")
    parser.add_argument("--interleave", type=int, default=1, help="chunks of layers a pipeline process has")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations instead of computing them again")
    parser.add_argument("--all", action="store_true", help="also the layouts that do not fit")
    parser.add_argument("--prove", metavar="TPxPPxDP", help="shard the model on the meta device and count every element")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(list(argv))
    config = _read(options.model)
    if options.gpus < 1:
        raise UserError(f"--gpus: expected >= 1, got {options.gpus}")
    if options.prove:
        print(proof(config, *_sizes(options.prove, options.gpus), interleave=options.interleave))
        return 0
    job = Job(
        algorithm=options.algorithm, completions=options.completions, prompt_tokens=options.prompt_tokens,
        completion_tokens=options.completion_tokens, micro_batch_tokens=options.micro_batch_tokens,
        max_sequences=options.max_sequences, checkpointing=not options.no_checkpointing, interleave=options.interleave,
    )  # fmt: skip
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
        "tokens a step. Computed, not measured: see docs/scaling.md."
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


def _read(path: Path) -> DecoderConfig:
    file = path / "config.json" if path.is_dir() else path
    try:
        return DecoderConfig.from_hf(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {file}: {error}") from None


def _sizes(text: str, gpus: int) -> tuple[int, int, int]:
    try:
        tp, pp, dp = (int(n) for n in text.lower().split("x"))
    except ValueError:
        raise UserError(f"--prove: expected three sizes such as 8x2x4, got {text!r}") from None
    if tp * pp * dp != gpus:
        raise UserError(f"--prove: {tp} x {pp} x {dp} is {tp * pp * dp}, not the {gpus} of --gpus")
    return tp, pp, dp
