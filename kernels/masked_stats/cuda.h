#pragma once

#include "args.h"
#include "csrc/cuda_launch.h"

namespace fastrlhf { namespace cuda {

// (n, mean, M2) of all elements into `out` (float64), their variance into `variance` (float32, or null).
int masked_moments(const MomentsArgs& a, double* out, float* variance, bool unbiased, const Launch& launch);
int row_sums(const RowSumsArgs& a, const Launch& launch);
// As StandardizeArgs, the shift and the scale from moments on the device.
int standardize(const StandardizeArgs& a, const double* moments, bool shift_mean, bool unbiased, double eps, const Launch& launch);

}}  // namespace
