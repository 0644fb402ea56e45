"""The operations for arrays that are not torch tensors: NumPy, and by DLPack JAX and CuPy. Forward only, without torch.

Arguments, formulas, shapes and errors are those of the functions of the same name in `fastrlhf`, of which those are here whose
forward is one call of the extension: not `linear_scores`, the fused policy losses of logits and hidden states, and
`logprob_drift`, which is made of torch. Results are arrays of the kind that the first argument is, float32 (float64 for
float64 inputs); statistics of losses are dicts of floats. bfloat16 is taken where the array has it (JAX, ml_dtypes), any byte
order of NumPy's. Arrays in the memory of a GPU are taken by `logprobs`, `gae`, `shape_rewards` and `discounted_returns` where
the CUDA kernels are built, which is not yet measured on a GPU.
"""

from .losses import LossAndStats, policy_loss, value_loss
from .pairs import PairLoss, preference_loss, regression_loss, reward_loss
from .rollouts import discounted_returns, experience, gae, group_advantages, shape_rewards
from .sampling import Sample, sample
from .softmax import Logprobs, kl, kl_full, linear_logprobs, logprobs
from .statistics import masked_mean, masked_var, sequence_logprobs, whiten

__all__ = [
    "Logprobs", "LossAndStats", "PairLoss", "Sample", "discounted_returns", "experience", "gae", "group_advantages", "kl",
    "kl_full", "linear_logprobs", "logprobs", "masked_mean", "masked_var", "policy_loss", "preference_loss",
    "regression_loss", "reward_loss", "sample", "sequence_logprobs", "shape_rewards", "value_loss", "whiten",
]  # fmt: skip
