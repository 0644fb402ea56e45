#pragma once

#include "args.h"
#include "csrc/isa.h"

namespace fastrlhf {

FASTRLHF_KERNEL(RolloutArgs, rollout)

}  // namespace fastrlhf
