#pragma once

#include "args.h"
#include "csrc/isa.h"

namespace fastrlhf {

FASTRLHF_KERNEL_F64(ValueArgs, value_loss)

}  // namespace fastrlhf
