#pragma once

#include "args.h"
#include "csrc/isa.h"

namespace fastrlhf {

FASTRLHF_KERNEL_BF16(LinearArgs, linear_logprobs_forward)
FASTRLHF_KERNEL_BF16(LinearBackwardArgs, linear_logprobs_backward)

// Elements of `LinearArgs::logits` for so many rows and columns, at any instruction set.
constexpr int64_t stored_size(int64_t rows, int64_t vocab) { return (rows + 31) / 32 * 32 * vocab; }

}  // namespace fastrlhf
