#pragma once

#include "args.h"
#include "csrc/cuda_launch.h"

namespace fastrlhf { namespace cuda {

int logprobs_forward(const LogprobsArgs& a, const Launch& launch);
int logprobs_combine(const LogprobsCombineArgs& c, const Launch& launch);
int logprobs_backward(const LogprobsBackwardArgs& b, const Launch& launch);

}}  // namespace
