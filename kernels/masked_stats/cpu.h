#pragma once

#include "args.h"
#include "csrc/isa.h"

namespace fastrlhf {

FASTRLHF_KERNEL(MomentsArgs, masked_moments)
FASTRLHF_KERNEL(RowSumsArgs, row_sums)
FASTRLHF_KERNEL(StandardizeArgs, standardize)

}  // namespace fastrlhf
