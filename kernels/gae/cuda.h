#pragma once

#include "args.h"
#include "csrc/cuda_launch.h"

namespace fastrlhf { namespace cuda {

// One launch; whitening is `masked_moments` and `standardize` of the advantages, afterwards.
int rollout(const RolloutArgs& a, const Launch& launch);

}}  // namespace
