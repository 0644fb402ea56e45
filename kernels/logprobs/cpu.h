#pragma once

#include "args.h"
#include "csrc/isa.h"

namespace fastrlhf {

FASTRLHF_KERNEL_BF16(LogprobsArgs, logprobs_forward)
FASTRLHF_KERNEL_BF16(LogprobsBackwardArgs, logprobs_backward)
FASTRLHF_KERNEL_BF16(LogprobsCombineArgs, logprobs_combine)

}  // namespace fastrlhf
