#pragma once

#include "args.h"
#include "csrc/isa.h"

namespace fastrlhf {

FASTRLHF_KERNEL_BF16(LinearArgs, linear_logprobs_forward)
FASTRLHF_KERNEL_BF16(LinearBackwardArgs, linear_logprobs_backward)
FASTRLHF_KERNEL_BF16(StoredLanes, linear_logprobs_stored_lanes)

// Elements of `LinearArgs::logits` for so many rows and columns, at any instruction set: [panel of `lanes` rows][column][lane].
constexpr int64_t stored_size(int64_t rows, int64_t vocab) { return (rows + 31) / 32 * 32 * vocab; }

}  // namespace fastrlhf
