#pragma once

#include "common/reduction_kind.h"
#include "csrc/tensor.h"

namespace fastrlhf {

constexpr int value_stats = 5;  // clip_fraction, explained_variance, value_mean, return_mean, tokens

struct ValueArgs {
  Rows rows;
  bool f64 = false;
  Array values, old_values, returns, mask;
  double clip = 0;                // infinite for none
  Reduction reduction = Reduction::token_mean;
  double denominator = 0;         // NaN: the local count
  void* grad_values = nullptr;    // (total) or null
  double* result = nullptr;       // 1 + value_stats
  int threads = 1;
};

}  // namespace fastrlhf
