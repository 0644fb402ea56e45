"""TRL's GRPO trainer with its loss, gradient and KL in one pass over the tokens, as a subclass:

from fastrlhf.integrations.trl import fused_loss
trainer = fused_loss(GRPOTrainer)(model=..., reward_funcs=..., args=..., train_dataset=...)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .seam import decline, obstacle

REDUCTIONS = {"grpo": "seq-mean-token-mean", "bnpo": "token-mean", "dr_grpo": "token-mean", "dapo": "token-mean"}
PASSED_ON = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes",
    "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


def fused_loss(trainer: type) -> type:
    """A subclass of TRL's `GRPOTrainer` (1.16) whose loss is `fastrlhf.policy_loss`: the same value, gradient and metrics.

    It serves `loss_type` grpo, bnpo, dr_grpo and dapo with token-level importance sampling, `delta`, and the KL to the
    reference.
    Anything else (sequence-level ratios, entropy bonus and quantile, off-policy masks, vLLM's importance weights, the
    bias-corrected KL, MoE's auxiliary loss) goes to TRL's own method, and the log says so once.
    """

    class FusedLoss(trainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if getattr(self, "use_liger_kernel", False) and hasattr(self, "compute_liger_loss"):  # before 1.14
                decline("trl GRPOTrainer.compute_loss", "use_liger_kernel, which goes past the fused loss")
            return super().compute_loss(*args, **kwargs)

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            reason = _unserved(self)
            if reason is not None:
                decline("trl GRPOTrainer._compute_loss", reason)
                return super()._compute_loss(model, inputs)
            return _loss(self, model, inputs)

    FusedLoss.__name__ = FusedLoss.__qualname__ = trainer.__name__
    return FusedLoss


def _unserved(trainer: Any) -> str | None:
    if trainer.loss_type not in REDUCTIONS:
        return f"loss_type {trainer.loss_type}"
    if trainer.importance_sampling_level != "token":
        return f"importance_sampling_level {trainer.importance_sampling_level}"
    for name, used in (
        ("top_entropy_quantile", trainer.top_entropy_quantile < 1.0),
        ("off_policy_mask_threshold", trainer.off_policy_mask_threshold is not None),
        ("an entropy bonus", trainer._entropy_bonus_enabled),
        ("MoE's auxiliary loss", trainer.aux_loss_enabled),
        ("vLLM's importance weights", trainer.use_vllm and trainer.vllm_importance_sampling_correction),
        ("use_bias_correction_kl", trainer.args.use_bias_correction_kl),
    ):
        if used:
            return name
    return None


def _loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    logprobs, entropies, _ = trainer._get_per_token_logps_and_entropies(
        model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        inputs["completion_ids"].shape[1],
        compute_entropy=True,
        compute_aux_loss=False,
        **{name: inputs.get(name) for name in PASSED_ON},
    )
    reason = obstacle(logprobs, "policy_loss")
    if reason is not None:
        raise TypeError(f"logprobs: the fused loss does not take {reason}; use TRL's own trainer")
    old = inputs.get("old_per_token_logps")
    old = logprobs.detach() if old is None else old
    training = trainer.model.training
    loss, stats = ops.policy_loss(
        logprobs, old, inputs["advantages"], mask, clip_low=trainer.epsilon_low, clip_high=trainer.epsilon_high,
        delta=trainer.args.delta, ref_logprobs=inputs["ref_per_token_logps"] if trainer.beta else None, kl_coef=trainer.beta,
        reduction=REDUCTIONS[trainer.loss_type], denominator=_denominator(trainer, inputs, logprobs, training),
    )  # fmt: skip
    mode = "train" if training else "eval"
    _record(trainer._metrics[mode], trainer, logprobs.detach(), old, inputs["advantages"], mask, entropies, stats)
    if trainer.loss_type != "dapo" and training:
        loss = loss / trainer.current_gradient_accumulation_steps
    return loss


def _denominator(trainer: Any, inputs: dict[str, Any], logprobs: Tensor, training: bool) -> float | Tensor | None:
    rows = float(max(logprobs.shape[0], 1))
    if trainer.loss_type == "grpo":
        return rows  # a sequence with nothing counted counts as 0
    if trainer.loss_type == "dr_grpo":
        return rows * trainer.max_completion_length
    if trainer.loss_type == "bnpo":
        return None
    tokens: Tensor = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    if training:
        tokens = tokens * trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
    return tokens


@torch.no_grad()
def _record(
    metrics: Any, trainer: Any, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, entropies: Tensor,
    stats: ops.LossStats,
) -> None:  # fmt: skip
    """TRL's metrics, over all processes: one reduction for the means, one gather for the extremes, one read of each."""
    a = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
    ratio = torch.exp(logprobs - old)
    if trainer.args.delta is not None:
        ratio = ratio.clamp(max=trainer.args.delta)
    low = ((ratio < 1 - trainer.epsilon_low) & (a < 0)).float()
    high = ((ratio > 1 + trainer.epsilon_high) & (a > 0)).float()
    count = mask.sum().float()
    sums = [(x * mask).sum() for x in (entropies, low, high, torch.maximum(low, high))]
    sums.append(stats.get("ref_kl") * count)
    totals = trainer.accelerator.reduce(torch.stack([*sums, count]), reduction="sum")
    entropy, low_mean, high_mean, region, kl = (totals[:-1] / totals[-1].clamp(min=1.0)).tolist()
    if trainer.beta:
        metrics["kl"].append(kl)
    metrics["entropy"].append(entropy)
    metrics["clip_ratio/low_mean"].append(low_mean)
    metrics["clip_ratio/high_mean"].append(high_mean)
    metrics["clip_ratio/region_mean"].append(region)
    by_row = torch.stack([(low * mask).sum(-1) / mask.sum(-1), (high * mask).sum(-1) / mask.sum(-1)], 1)  # NaN without a token
    rows = trainer.accelerator.gather(by_row)
    some = ~rows.isnan()
    least = torch.where(some[:, 0], rows[:, 0], torch.inf).min()
    most = torch.where(some[:, 1], rows[:, 1], -torch.inf).max()
    ends = torch.where(some.any(0), torch.stack([least, most]), torch.nan).tolist()
    metrics["clip_ratio/low_min"].append(ends[0])
    metrics["clip_ratio/high_max"].append(ends[1])
