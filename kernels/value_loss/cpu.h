#pragma once

#include "args.h"
#include "csrc/isa.h"

namespace fastrlhf {

FASTRLHF_KERNEL(ValueArgs, value_loss)

}  // namespace fastrlhf
