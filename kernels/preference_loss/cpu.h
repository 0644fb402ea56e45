#pragma once

#include "csrc/tensor.h"

namespace fastrlhf {

enum class PreferenceKind : int {
  dpo = 0, robust = 1, ipo = 2, hinge = 3, rpo_sq = 4, rpo_fwd_kl = 5, rpo_bwd_kl = 6, simpo = 7, orpo = 8, kto = 9
};

// One loss a pair, with its derivatives. Everything is (n) double: there are as many pairs as sequences.
struct PreferenceArgs {
  int64_t pairs = 0;
  const double *chosen = nullptr, *rejected = nullptr, *ref_chosen = nullptr, *ref_rejected = nullptr;  // ref: may be null
  const double *chosen_rewards = nullptr, *rejected_rewards = nullptr;
  PreferenceKind kind = PreferenceKind::dpo;
  double beta = 0.1, label_smoothing = 0, reward_scale = 1, margin = 0;
  double kl_baseline = 0, desirable_weight = 1, undesirable_weight = 1;
  double *losses = nullptr, *grad_chosen = nullptr, *grad_rejected = nullptr;  // (n)
};

void preference_loss(const PreferenceArgs& a);

}  // namespace fastrlhf
