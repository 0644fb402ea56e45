#pragma once

#include "csrc/tensor.h"

namespace fastrlhf {

enum class MaskMode : int { carry = 0, zero = 1, none = 2 };

// Reward shaping, generalised advantages, or both in one pass over the rows; what is nullptr is not computed.
struct RolloutArgs {
  Rows rows;
  bool f64 = false;                 // compute and write double instead of float
  Array rewards;                    // given, or shaped from the four below
  Array scores, logprobs, ref_logprobs;
  Array values, mask, bootstrap;
  double kl_coef = 0, score_clip = 0, kl_clip = 0;  // clips: infinite for none
  int kl_kind = 0;
  double gamma = 1, lam = 1;
  const double* lams = nullptr;     // (B), instead of lam
  MaskMode mask_mode = MaskMode::carry;
  void *shaped = nullptr, *kl = nullptr, *advantages = nullptr, *returns = nullptr;
  bool whiten = false;              // the advantages, over mask != 0, with unbiased variance + 1e-8; zeros elsewhere
  int threads = 1;
};

}  // namespace fastrlhf
