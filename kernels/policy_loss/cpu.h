#pragma once

#include "args.h"
#include "csrc/isa.h"

namespace fastrlhf {

FASTRLHF_KERNEL(PolicyArgs, policy_loss)

}  // namespace fastrlhf
