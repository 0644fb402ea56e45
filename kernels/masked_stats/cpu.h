#pragma once

#include "args.h"
#include "csrc/isa.h"

namespace fastrlhf {

FASTRLHF_KERNEL_F64(MomentsArgs, masked_moments)
FASTRLHF_KERNEL_F64(RowSumsArgs, row_sums)
FASTRLHF_KERNEL_F64(StandardizeArgs, standardize)

}  // namespace fastrlhf
