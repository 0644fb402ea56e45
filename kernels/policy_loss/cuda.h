#pragma once

#include "args.h"
#include "csrc/cuda_launch.h"

namespace fastrlhf { namespace cuda {

// What a loss leaves on the device: itself (float32), its statistics (float32), and the inverse of its divisor, which the
// gradients are still without. `denominator`: a given divisor on the device, or null.
struct LossResults {
  float *loss = nullptr, *stats = nullptr, *share = nullptr;
  const double* denominator = nullptr;
};

int policy_loss(const PolicyArgs& a, const LossResults& results, const Launch& launch);

// out = d * grad * share, as dtype.
int scale(const float* d, const float* grad, const float* share, int64_t count, DType dtype, void* out, const Launch& launch);

// x *= *factor, which reads and writes nothing where that is 1.
int rescale(void* x, const float* factor, int64_t count, DType dtype, const Launch& launch);

}}  // namespace
