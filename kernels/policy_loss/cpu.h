#pragma once

#include "args.h"
#include "csrc/isa.h"

namespace fastrlhf {

FASTRLHF_KERNEL_F64(PolicyArgs, policy_loss)

}  // namespace fastrlhf
