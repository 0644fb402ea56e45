"""The operations of RLHF, one pass over memory each. OPS: log-probs, KL, rewards and advantages, statistics, losses,
sampling. Imports nothing of fastrlhf but the kernels and the extension."""

from ..kernels.policy_loss.reference import RolloutCorrection
from .drift import LogprobDrift, logprob_drift
from .gae import Experience, discounted_returns, experience, gae, shape_rewards
from .group_advantages import group_advantages
from .kl import AdaptiveKL, FixedKL, kl, kl_full
from .linear_logprobs import linear_logprobs
from .linear_policy_loss import linear_policy_loss
from .linear_scores import Scores, linear_scores
from .logits_policy_loss import LogitsPolicyLoss, logits_policy_loss
from .logprobs import Logprobs, VocabParallel, logprobs
from .masked_stats import masked_mean, masked_var, whiten
from .policy_loss import PolicyLoss, policy_loss
from .preference_loss import PreferenceLoss, preference_loss, reward_loss
from .regression_loss import RegressionLoss, regression_loss
from .sampling import Sample, sample
from .sequence_logprobs import sequence_logprobs
from .stats import LossStats
from .steerlm2_loss import SteerLM2Loss, steerlm2_loss
from .topk_distill_loss import DistillLoss, topk_distill_loss
from .value_loss import ValueLoss, value_loss

__all__ = [
    "AdaptiveKL", "DistillLoss", "Experience", "FixedKL", "LogitsPolicyLoss", "LogprobDrift", "Logprobs", "LossStats",
    "PolicyLoss", "PreferenceLoss", "RegressionLoss", "RolloutCorrection", "Sample", "Scores", "SteerLM2Loss", "ValueLoss",
    "VocabParallel", "discounted_returns", "experience", "gae", "group_advantages", "kl", "kl_full", "linear_logprobs",
    "linear_policy_loss", "linear_scores", "logits_policy_loss", "logprob_drift", "logprobs", "masked_mean", "masked_var",
    "policy_loss", "preference_loss", "regression_loss", "reward_loss", "sample", "sequence_logprobs", "shape_rewards",
    "steerlm2_loss", "topk_distill_loss", "value_loss", "whiten",
]  # fmt: skip
