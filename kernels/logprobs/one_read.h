#pragma once

#include "args.h"
#include "csrc/cuda_launch.h"
#include "policy_loss/args.h"

namespace fastrlhf { namespace cuda {

// Log-probs, entropies and the gradient of a token-level policy loss from one read of the logits and one write.
struct OneReadArgs {
  LogprobsArgs logprobs;          // one label a row; neither soft cap nor kept set
  PolicyArgs policy;              // its rows' tokens are the rows of logits, in order; logprobs and entropy are not looked at
  bool entropy_term = false;
  const float* share = nullptr;   // what every token's gradient is multiplied by
  Matrix grad;                    // of the logits' dtype; not the logits
};

// Whether rows like these fit on chip and start at 16 bytes, on a device of this compute capability.
bool one_read_fits(const Matrix& logits, int64_t vocab, int major);
int one_read(const OneReadArgs& a, const Launch& launch);

}}  // namespace
