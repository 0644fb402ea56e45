#pragma once

#include "csrc/tensor.h"

namespace fastrlhf {

enum class PreferenceKind : int {
  dpo = 0, robust = 1, ipo = 2, hinge = 3, rpo_sq = 4, rpo_fwd_kl = 5, rpo_bwd_kl = 6, simpo = 7, orpo = 8, kto = 9,
  bt = 10, margin_bt = 11, scaled_bt = 12  // the reward model's; their margins arrive as chosen_rewards
};

constexpr int preference_stats = 5;  // accuracy, margin, chosen, rejected, sft loss
constexpr int reward_stats = 4;      // of the kinds bt, margin_bt, scaled_bt: all but the sft loss
constexpr int regression_stats = 3;  // mse, mae, count

// Losses of pairs, their mean (over `denominator`, NaN: the pairs), and derivatives. As many pairs as sequences: no need
// for vectors.
struct PreferenceArgs {
  int64_t pairs = 0;
  bool f64 = false;                 // write double instead of float
  Array chosen, rejected, ref_chosen, ref_rejected, chosen_rewards, rejected_rewards, chosen_lengths;  // (B) or absent
  PreferenceKind kind = PreferenceKind::dpo;
  double beta = 0.1, label_smoothing = 0, reward_scale = 1, margin = 0;
  double kl_baseline = 0, desirable_weight = 1, undesirable_weight = 1;
  double sft_coef = 0, denominator = 0;
  void *loss = nullptr, *losses = nullptr;                       // (), (B)
  void *d_chosen = nullptr, *d_rejected = nullptr;               // (B) or null: of each loss
  void *mean_d_chosen = nullptr, *mean_d_rejected = nullptr;     // (B) or null: of the mean, with the sft term
  float* stats = nullptr;
};

// Mean squared error over the targets that are given.
struct RegressionArgs {
  int64_t count = 0;
  bool f64 = false;
  Array predictions, targets;       // contiguous, row_stride 1
  double ignore_value = -100;
  void *loss = nullptr, *grad = nullptr;  // (), (count) or null
  float* stats = nullptr;
};

void preference_loss(const PreferenceArgs& a);
void regression_loss(const RegressionArgs& a);

}  // namespace fastrlhf
