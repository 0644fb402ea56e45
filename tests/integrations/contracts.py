"""NeMo-RL's and slime's functions as their sources define them, written here in plain PyTorch: neither can be installed where
the tests run. What a host really does is compared again, where it is installed, before a seam goes live."""

from __future__ import annotations

import types

import torch


def _logprobs(logits, target):
    return torch.log_softmax(logits.float(), -1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


class DistributedLogprob:
    @staticmethod
    def apply(logits, target, start, end, group, inference_only=False):
        out = _logprobs(logits, target)
        return out.detach() if inference_only else out


class ChunkedDistributedLogprob:
    @staticmethod
    def apply(logits, target, start, end, chunk_size, group, inference_only=False):
        return DistributedLogprob.apply(logits, target, start, end, group, inference_only)


class ChunkedDistributedEntropy:
    @staticmethod
    def apply(logits, chunk_size, group, inference_only=False):
        log_p = torch.log_softmax(logits.float(), -1)
        return (log_p.exp() * log_p).sum(-1)


class GeneralizedAdvantageEstimator:
    def _compute_gae(self, token_level_rewards, values, mask, gae_lambda=None):
        lam = self.gae_lambda if gae_lambda is None else gae_lambda
        following, running, out = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), torch.zeros_like(values)
        for t in range(values.shape[1] - 1, -1, -1):
            step = token_level_rewards[:, t] + self.gae_gamma * following - values[:, t] + self.gae_gamma * lam * running
            m = mask[:, t]
            running, following = step * m + (1 - m) * running, values[:, t] * m + (1 - m) * following
            out[:, t] = running
        return out, out + values


def calculate_kl(
    logprobs,
    logprobs_reference,
    kl_type="k3",
    input_clamp_value=20.0,
    output_clamp_value=10.0,
    importance_sampling_weights=None,
):
    d = logprobs_reference - logprobs
    if input_clamp_value is not None:
        d = d.clamp(-input_clamp_value, input_clamp_value)
    kinds = {"k1": lambda: -d, "k2": lambda: d * d / 2, "k3": lambda: d.exp() - 1 - d}
    if kl_type not in kinds:
        raise ValueError(kl_type)
    out = kinds[kl_type]()
    if importance_sampling_weights is not None:
        out = out * importance_sampling_weights
    return out if output_clamp_value is None else out.clamp(-output_clamp_value, output_clamp_value)


def masked_mean(values, mask, dim=None, global_normalization_factor=None):
    count = mask.sum(dim) if global_normalization_factor is None else global_normalization_factor
    return (values * mask).sum(dim) / (count + 1e-8)


def masked_var(values, mask, mean=None, unbiased=True):
    mean = (values * mask).sum() / mask.sum() if mean is None else mean
    return ((values - mean) ** 2 * mask).sum() / (mask.sum() - (1 if unbiased else 0))


def calculate_log_probs_and_entropy(
    logits, tokens, tp_group, with_entropy=False, chunk_size=-1, log_prob_keep_mask=None, with_entropy_grad=True
):
    kept = logits if log_prob_keep_mask is None else logits.masked_fill(~log_prob_keep_mask, -torch.inf)
    log_p = torch.log_softmax(logits, -1)
    return _logprobs(kept, tokens).unsqueeze(-1), -(log_p.exp() * log_p).sum(-1) if with_entropy else None


def vanilla_gae(rewards, values, gamma, lambd):
    out, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        following = values[:, t + 1] if t + 1 < values.shape[1] else 0.0
        running = rewards[:, t] + gamma * following - values[:, t] + gamma * lambd * running
        out[:, t] = running
    return out, out + values


def chunked_gae(rewards, values, gamma, lambd, chunk_size=128):
    return vanilla_gae(rewards, values, gamma, lambd)


def compute_approx_kl(log_probs, log_probs_base, kl_loss_type, importance_ratio=None):
    d = log_probs.float() - log_probs_base.float()
    kinds = {
        "k1": lambda: d,
        "k2": lambda: d * d / 2,
        "k3": lambda: (-d).exp() - 1 + d,
        "low_var_kl": lambda: (-d).exp() - 1 + d,
    }
    if kl_loss_type not in kinds:
        raise ValueError(kl_loss_type)
    out = kinds[kl_loss_type]()
    if importance_ratio is not None:
        out = out * importance_ratio
    return out.clamp(-10, 10) if kl_loss_type == "low_var_kl" else out


MODULES = {
    "nemo_rl.distributed.model_utils": (DistributedLogprob, ChunkedDistributedLogprob, ChunkedDistributedEntropy),
    "nemo_rl.algorithms.advantage_estimator": (GeneralizedAdvantageEstimator,),
    "nemo_rl.algorithms.utils": (calculate_kl, masked_mean, masked_var),
    "slime.utils.ppo_utils": (calculate_log_probs_and_entropy, chunked_gae, vanilla_gae, compute_approx_kl),
}


def modules(package: str) -> dict[str, types.ModuleType]:
    """Of one host, for sys.modules."""
    made: dict[str, types.ModuleType] = {}
    for path, functions in MODULES.items():
        if path.split(".")[0] == package:
            for i in range(1, path.count(".") + 2):
                name = ".".join(path.split(".")[:i])
                made.setdefault(name, types.ModuleType(name))
                made[name].__path__ = []
            for f in functions:
                setattr(made[path], f.__name__, f)
    made[package].__version__ = {"nemo_rl": "0.7.0", "slime": "0.3.1"}[package]
    return made
