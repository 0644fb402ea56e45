#pragma once

#include "args.h"
#include "policy_loss/cuda.h"

namespace fastrlhf { namespace cuda {

int value_loss(const ValueArgs& a, const LossResults& results, const Launch& launch);

}}  // namespace
