#pragma once

#include "common/reduction_kind.h"
#include "csrc/tensor.h"

namespace fastrlhf {

enum class PolicyKind : int { ppo = 0, reinforce = 1, cispo = 2, sapo = 3, gspo = 4, gmpo = 5 };
enum class Correction : int { none = 0, tis = 1, mis = 2, icepop = 3 };
enum class CorrectionLevel : int { token = 0, sequence = 1, geometric = 2 };

// result: the loss, then these (kernels/policy_loss/reference.py names them in the same order)
constexpr int policy_stats = 15;

struct PolicyArgs {
  Rows rows;
  bool f64 = false;
  Array logprobs, old_logprobs, advantages, mask, rollout_logprobs, ref_logprobs, entropy;
  PolicyKind kind = PolicyKind::ppo;
  double clip_low = 0.2, clip_high = 0.2;
  double dual_clip = 0, ratio_clamp = 0, delta = 0;  // infinite for none
  double tau_pos = 1, tau_neg = 1.05;
  Correction correction = Correction::none;
  CorrectionLevel correction_level = CorrectionLevel::token;
  double correction_low = 0, correction_high = 0;
  double kl_coef = 0, entropy_coef = 0;
  int kl_kind = 3;
  Reduction reduction = Reduction::token_mean;
  double denominator = 0;        // NaN: the local count
  void* grad_logprobs = nullptr; // (total) or null
  void* grad_entropy = nullptr;  // (total) or null
  double* result = nullptr;      // 1 + policy_stats
  int threads = 1;
};

}  // namespace fastrlhf
