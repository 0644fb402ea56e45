"""Training runs of TRL and of verl's functions, as they are and with ours in their place: the same seed, the same metrics?

python -m bench.hosts                    # all, each in two processes, and what came out beside each other
python -m bench.hosts --only grpo,gae --out bench/results/hosts-cpu.json

Exit status 1 where a metric differs by more than 1e-4.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .report import machine

STEPS = 20
BAR = 1e-4
WORDS = [f"{a}{b}" for a in "abcdefghij" for b in "aeiouklmnr"]
VOCAB = 32_000
TIMES = ("runtime", "per_second", "step_time", "/time", "seconds")


# --- a small model, and its words --------------------------------------------------------------------------------------------


def small_model(directory: Path) -> Path:
    """Two layers and a vocabulary of 32,000, as a Hugging Face directory with a tokenizer of a hundred words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    if (directory / "config.json").exists():
        return directory
    words = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def words(directory: Path) -> Any:
    """The tokenizer; AutoTokenizer would take the model type's."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def sentences(count: int, length: int, seed: int) -> list[str]:
    import random

    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=length)) for _ in range(count)]


def settings(directory: Path) -> dict[str, Any]:
    """Of every TRL run."""
    return {
        "output_dir": str(directory / "out"), "max_steps": STEPS, "logging_steps": 1, "report_to": [], "seed": 7,
        "use_cpu": True,
        "save_strategy": "no", "learning_rate": 1e-3, "bf16": False, "disable_tqdm": True, "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
    }  # fmt: skip


def history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    rows = [r for r in trainer.state.log_history if "train_runtime" not in r]
    return [{k: v for k, v in r.items() if isinstance(v, int | float) and not any(t in k for t in TIMES)} for r in rows]


# --- the runs ----------------------------------------------------------------------------------------------------------------


def grpo(directory: Path) -> list[dict[str, float]]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [sum(w.startswith("a") for w in c.split()) / 8 + len(c) % 5 / 10 for c in completions]

    config = GRPOConfig(
        **settings(directory), per_device_train_batch_size=8, num_generations=4, max_completion_length=48, beta=0.04,
        num_iterations=2, temperature=0.9,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": sentences(64, 6, 1)})
    return history(
        GRPOTrainer(str(directory), reward_funcs=reward, args=config, train_dataset=data, processing_class=words(directory))
    )


def sft(directory: Path) -> list[dict[str, float]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**settings(directory), per_device_train_batch_size=8, max_length=128)
    data = Dataset.from_dict({"text": sentences(200, 60, 2)})
    return history(SFTTrainer(str(directory), args=config, train_dataset=data, processing_class=words(directory)))


def dpo(directory: Path) -> list[dict[str, float]]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(**settings(directory), per_device_train_batch_size=4, max_length=128)
    columns = ("prompt", "chosen", "rejected")
    data = Dataset.from_dict({c: sentences(100, 20, 3 + i) for i, c in enumerate(columns)})
    return history(DPOTrainer(str(directory), args=config, train_dataset=data, processing_class=words(directory)))


def actor(directory: Path) -> list[dict[str, float]]:
    """verl's functions in the order of its actor's update: log-probs and entropy from logits, group advantages, the vanilla
    loss, the KL loss; without its Ray workers."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM
    from verl.trainer.ppo import core_algos
    from verl.utils import torch_functional
    from verl.workers.config import FSDPActorConfig

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(directory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = FSDPActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28
    )
    rows = []
    for _ in range(STEPS // 2):
        ids = torch.randint(3, 103, (8, 72))
        mask = torch.ones(8, 64)
        mask[:, 40:50] = 0  # a tool's answer
        mask[-1, 56:] = 0
        rewards = torch.zeros(8, 64)
        rewards[:, 30] = torch.rand(8)
        advantages, _ = core_algos.compute_grpo_outcome_advantage(rewards, mask, np.repeat(np.arange(2), 4))
        old = None
        for _ in range(2):
            logits = model(ids).logits[:, 7:-1].div(0.9)
            log_prob = torch_functional.logprobs_from_logits(logits, ids[:, 8:])
            entropy = torch_functional.entropy_from_logits(logits)
            old = log_prob.detach() if old is None else old
            loss, metrics = core_algos.get_policy_loss_fn("vanilla")(
                old_log_prob=old, log_prob=log_prob, advantages=advantages, response_mask=mask, config=config
            )
            kl = core_algos.kl_penalty(log_prob, old, "low_var_kl")
            total = (
                loss
                + 0.01 * core_algos.agg_loss(kl, mask, "token-mean")
                - 0.01 * core_algos.agg_loss(entropy, mask, "token-mean")
            )
            optimizer.zero_grad()
            total.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            mean = torch_functional.masked_mean(entropy.detach(), mask)
            rows.append({"loss": float(total), "entropy": float(mean), "grad_norm": float(norm), **metrics})
    return rows


def gae(directory: Path) -> list[dict[str, float]]:
    """verl's GAE at 256 x 16384 with gaps in the mask; the best of five."""
    import torch
    from verl.trainer.ppo import core_algos

    torch.manual_seed(5)
    r, v = torch.randn(256, 16384), torch.randn(256, 16384)
    mask = (torch.rand(256, 16384) < 0.8).float()
    took = []
    for _ in range(5):
        start = time.perf_counter()
        advantages, returns = core_algos.compute_gae_advantage_return(r, v, mask, 0.99, 0.95)
        took.append(time.perf_counter() - start)
    found = {"seconds": min(took), "advantages": float(advantages.abs().mean()), "returns": float(returns.abs().mean())}
    return [found | {f"advantages {i}": float(advantages[i, 7 * i]) for i in range(0, 256, 25)}]


RUNS: dict[str, tuple[str, Callable[[Path], list[dict[str, float]]]]] = {
    "grpo": ("trl", grpo), "sft": ("trl", sft), "dpo": ("trl", dpo), "actor": ("verl", actor), "gae": ("verl", gae),
}  # fmt: skip


# --- each in a process of its own --------------------------------------------------------------------------------------------


def one(name: str, patched: bool, directory: Path) -> dict[str, Any]:
    import torch

    host, run = RUNS[name]
    live: list[str] = []
    if patched:
        from fastrlhf import integrations

        live = integrations.patch(host, quiet=True).live
    torch.manual_seed(11)
    head = Head()
    head.attach(host)
    start = time.perf_counter()
    rows = run(directory)
    return {
        "rows": rows,
        "wall": time.perf_counter() - start,
        "live": live,
        "head_seconds": head.seconds,
        "head_bytes": head.bytes,
    }


class Head:
    """The time and the largest memory of a host's log-probs and entropy, forward and backward, inside a run: TRL's from hidden
    states, verl's from logits. Measured on a copy of a call, so that neither the profiler nor the second call touches the
    run's figures."""

    def __init__(self) -> None:
        self.seconds, self.bytes, self.calls = 0.0, 0, 0

    def attach(self, host: str) -> None:
        {"trl": self._trl, "verl": self._verl}[host]()

    def _trl(self) -> None:
        from trl.trainer import utils

        held, head = utils._ChunkedLogProbFunction, self

        class Measured:
            @staticmethod
            def apply(hidden: Any, weight: Any, *rest: Any) -> Any:
                head.measure(lambda h, w: held.apply(h, w, *rest)[:1], hidden, weight)
                return held.apply(hidden, weight, *rest)

        utils._ChunkedLogProbFunction = Measured

    def _verl(self) -> None:
        from verl.utils import torch_functional

        held = torch_functional.logprobs_from_logits

        def measured(logits: Any, labels: Any) -> Any:
            self.measure(lambda x: (held(x * 1.0, labels), torch_functional.entropy_from_logits(x)), logits)
            return held(logits, labels)

        torch_functional.logprobs_from_logits = measured

    def measure(self, function: Callable[..., tuple[Any, ...]], *tensors: Any) -> None:
        """The third and the ninth call."""
        import torch
        from fastrlhf.verification.speed import peak_bytes

        self.calls += 1
        if self.calls not in (3, 9):
            return
        inputs = [t.detach().requires_grad_() for t in tensors]

        def run() -> None:
            with torch.enable_grad():
                torch.autograd.grad(sum(out.sum() for out in function(*inputs)), inputs)

        state = torch.get_rng_state()
        run()
        start = time.perf_counter()
        run()
        self.seconds, self.bytes = time.perf_counter() - start, peak_bytes(run, "cpu")
        torch.set_rng_state(state)


def pair(name: str, directory: Path) -> dict[str, Any]:
    found = {}
    for patched in (False, True):
        command = [sys.executable, "-m", "bench.hosts", "--child", name, "--directory", str(directory)]
        env = dict(os.environ, VERL_USE_EXTERNAL_PLUGINS="none")
        with tempfile.NamedTemporaryFile("r", suffix=".json") as out:
            done = subprocess.run(
                [*command, "--out", out.name, *(["--patched"] if patched else [])], env=env, capture_output=True
            )
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr.decode()[-2000:]}")
            found[patched] = json.loads(Path(out.name).read_text())
    return compare(name, found[False], found[True])


def compare(name: str, host: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The largest difference of each metric over the steps, absolute; what is no number in one of them differs infinitely."""
    differences: dict[str, float] = {}
    relative: dict[str, float] = {}
    for a, b in zip(host["rows"], ours["rows"], strict=True):
        for key in a.keys() & b.keys() - {"seconds"}:
            d = difference(a[key], b[key])
            differences[key] = max(differences.get(key, 0.0), d)
            relative[key] = max(relative.get(key, 0.0), d / max(1.0, abs(a[key])))
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
    worst = max(relative, key=lambda k: relative[k])
    result = {
        "run": name, "host": RUNS[name][0], "steps": len(host["rows"]), "live": len(ours["live"]), "metrics": len(differences),
        "largest_difference": relative[worst], "of": worst, "wall_host": host["wall"], "wall_ours": ours["wall"],
        "head_seconds": [host["head_seconds"], ours["head_seconds"]], "head_bytes": [host["head_bytes"], ours["head_bytes"]],
        "differences": differences,
    }  # fmt: skip
    if name == "gae":
        seconds = [host["rows"][0]["seconds"], ours["rows"][0]["seconds"]]
        result |= {"seconds": seconds, "faster": seconds[0] / seconds[1]}
    return result


def difference(a: float, b: float) -> float:
    d = abs(a - b)
    return math.inf if math.isnan(d) else d


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--out")
    parser.add_argument("--directory")
    parser.add_argument("--child")
    parser.add_argument("--patched", action="store_true")
    options = parser.parse_args()
    if options.child:
        Path(options.out).write_text(json.dumps(one(options.child, options.patched, Path(options.directory))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = small_model(Path(options.directory or temporary))
        results = []
        for name in options.only.split(","):
            results.append(pair(name, directory))
            print(json.dumps({k: v for k, v in results[-1].items() if k != "differences"}), flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps({"machine": machine(), "rows": results}, indent=1) + "\n")
    far = [f"{r['run']}: {r['of']} differs by {r['largest_difference']:.1e}" for r in results if r["largest_difference"] > BAR]
    if far:
        raise SystemExit("\n".join(far))


if __name__ == "__main__":
    main()
