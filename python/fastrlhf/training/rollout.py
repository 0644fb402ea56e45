"""Rollouts: prompts, what the policy answered, what it was worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import option
from ..data import Prompt
from ..generation import Completion, Engine, Sampling
from ..seeds import mix
from .batches import Sequences
from .progress import Progress
from .rewards import Rewards, Scored
from .timers import Timers


@dataclass
class SamplingConfig:
    """How completions are drawn."""

    max_tokens: int = option(128, "The most tokens of a completion, its end token among them.", low=1)
    temperature: float = option(1.0, "Of the softmax; the log-probs of training are taken at it too.", above=0)
    top_k: int = option(0, "Draw from the k most likely tokens; 0 from all.", low=0)
    top_p: float = option(1.0, "Draw from the smallest set whose probability reaches this.", above=0, high=1)
    min_p: float = option(0.0, "Leave out tokens below this share of the most likely one's probability.", low=0, high=1)
    stop: list[str] = option([], "Strings that end a completion, besides the tokenizer's end token.")

    def sampling(self, n: int, eos: int) -> Sampling:
        return Sampling(
            n=n, max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            min_p=self.min_p, stop_tokens=(eos,), stop=tuple(self.stop),
        )  # fmt: skip


@dataclass
class ScoreConfig:
    """What is done to rewards before they become advantages."""

    unended: str = option(
        "keep", "Completions cut off at max_tokens: keep treats them as others, mask takes them out of the policy's loss.",
        choices=("keep", "mask"),
    )  # fmt: skip
    unended_score: float | None = option(None, "Their score instead of the reward; null keeps the reward.")
    length_penalty: float = option(0.0, "Taken off the score for each token of the completion.", low=0)
    overlong_buffer: int = option(
        0, "Tokens before max_tokens over which a penalty rises from 0 to overlong_penalty (DAPO); 0 for none.", low=0
    )
    overlong_penalty: float = option(1.0, "At max_tokens.", low=0)


@dataclass
class Rollout:
    """P prompts with n completions each, N = P · n, prompt by prompt. Per-token tensors are packed over the completions.

    `scored` is what the rewards gave, `scores` (N) with the penalties. `mask` (tokens) is 0 where the policy's loss does
    not count, `counted` (N) how many tokens of a completion it counts.
    `logprobs`, `ref_logprobs`, `values` are filled in by who needs them, `first_logprobs` by the update where its only step's
    own log-probs are the policy's.
    """

    prompts: list[Prompt]
    sequences: Sequences
    completions: list[Completion]
    texts: list[str]
    scored: Scored
    scores: Tensor
    group_ids: Tensor
    rollout_logprobs: Tensor
    mask: Tensor
    counted: list[int]
    cu_seqlens: Tensor
    logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    first_logprobs: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    def samples(self, count: int) -> list[dict[str, Any]]:
        n = len(self.completions) // len(self.prompts)
        chosen = [i * n for i in range(min(count, len(self.prompts)))]
        return [
            {
                "prompt": self.prompts[i // n].text,
                "completion": self.texts[i],
                "reward": float(self.scored.total[i]),
                **{name: float(part[i]) for name, part in self.scored.parts.items()},
                "tokens": len(self.completions[i].tokens),
                "finish_reason": self.completions[i].finish_reason,
            }
            for i in chosen
        ]


def collect(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, rewards: Rewards, score: ScoreConfig, tokenizer: Any,
    *, seed: int, device: torch.device, timers: Timers, progress: Progress,
) -> Rollout:  # fmt: skip
    """Generate n completions of each prompt and score them. `seed` and a prompt's place decide what is drawn."""
    seeds = [mix(seed, i) for i in range(len(prompts))]
    with timers("generate"), progress.phase("generate", len(prompts) * sampling.n) as phase:
        groups = engine.generate([p.tokens for p in prompts], sampling, seeds=seeds, progress=phase.advance)
    timers.count("generate", engine.stats.completion_tokens)
    completions = [c for group in groups for c in group]
    asked = [p for p in prompts for _ in range(sampling.n)]
    sequences = Sequences(
        [p.tokens + c.tokens for p, c in zip(asked, completions, strict=True)], [len(p.tokens) for p in asked]
    )
    with timers("score"), progress.phase("score"):
        texts = [tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
        scored = rewards(asked, sequences.tokens, texts)
    lengths = torch.tensor(sequences.completion_lengths)
    ended = torch.tensor([c.ended for c in completions])
    kept = ended if score.unended == "mask" else torch.ones_like(ended)
    return Rollout(
        prompts=list(prompts),
        sequences=sequences,
        completions=completions,
        texts=texts,
        scored=scored,
        scores=_penalised(scored.total, lengths, ended, score, sampling.max_tokens).to(device),
        group_ids=torch.arange(len(prompts)).repeat_interleave(sampling.n).to(device),
        rollout_logprobs=torch.tensor([x for c in completions for x in c.logprobs], dtype=torch.float32, device=device),
        mask=torch.repeat_interleave(kept.float(), lengths).to(device),
        counted=(kept * lengths).tolist(),
        cu_seqlens=sequences.offsets.to(device),
        metrics=_metrics(scored, lengths, ended, prompts),
    )


def _penalised(total: Tensor, lengths: Tensor, ended: Tensor, score: ScoreConfig, max_tokens: int) -> Tensor:
    scores = total.clone()
    if score.unended_score is not None:
        scores = torch.where(ended, scores, torch.full_like(scores, score.unended_score))
    scores = scores - score.length_penalty * lengths
    if score.overlong_buffer:
        over = (lengths - (max_tokens - score.overlong_buffer)).clamp(min=0) / score.overlong_buffer
        scores = scores - score.overlong_penalty * over
    return scores


def _metrics(scored: Scored, lengths: Tensor, ended: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
    out = {"reward": float(scored.total.mean()), "reward_std": float(scored.total.std(correction=0))}
    out |= {f"reward/{name}": float(part.mean()) for name, part in scored.parts.items()}
    out |= {
        "completion_length/mean": float(lengths.float().mean()),
        "completion_length/max": float(lengths.max()),
        "prompt_length/mean": sum(len(p.tokens) for p in prompts) / len(prompts),
        "ended_fraction": float(ended.float().mean()),
    }
    return out
