// Masked moments of what a block holds, without a sum of squares: the mean first, then deviations about it.
#pragma once

#include "common/cuda/tokens.cuh"
#include "common/moments.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int thread_groups = unit_size / (unit_threads * group);  // groups of a unit that one thread holds

// Of N arrays under one mask; x and m of `groups` groups of each thread. Every thread gets the results.
template <int N>
__device__ __forceinline__ void block_moments(const float (&x)[N][thread_groups][group], const float (&m)[thread_groups][group], double* space,
                                              Moments (&out)[N]) {
  float first[N + 1] = {};
#pragma unroll
  for (int g = 0; g < thread_groups; ++g)
#pragma unroll
    for (int i = 0; i < group; ++i) {
      first[N] += m[g][i];
#pragma unroll
      for (int k = 0; k < N; ++k) first[k] += m[g][i] != 0 ? m[g][i] * x[k][g][i] : 0.f;
    }
  block_sum(first, space);
  float second[2 * N] = {};
  float mean[N];
#pragma unroll
  for (int k = 0; k < N; ++k) mean[k] = first[N] != 0 ? first[k] / first[N] : 0.f;
#pragma unroll
  for (int g = 0; g < thread_groups; ++g)
#pragma unroll
    for (int i = 0; i < group; ++i)
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const float w = m[g][i], d = w != 0 ? x[k][g][i] - mean[k] : 0.f;
        second[2 * k] += w * d;
        second[2 * k + 1] = fmaf(w * d, d, second[2 * k + 1]);
      }
  block_sum(second, space);
#pragma unroll
  for (int k = 0; k < N; ++k) out[k] = Moments::about(first[N], mean[k], second[2 * k], second[2 * k + 1]);
}

// Partial moments, three doubles apart by `stride`, merged by the threads of one block in a fixed order; thread 0 gets the result.
// `space`: 3 doubles for each thread.
__device__ inline Moments merge_partials(const double* partials, int64_t count, int64_t stride, double* space) {
  const int64_t each = (count + blockDim.x - 1) / blockDim.x, begin = threadIdx.x * each;
  Moments mine;
  for (int64_t i = begin; i < begin + each && i < count; ++i) {
    const double* p = partials + i * stride;
    mine.merge({load_shared_by_blocks(p), load_shared_by_blocks(p + 1), load_shared_by_blocks(p + 2)});
  }
  double* to = space + 3 * threadIdx.x;
  to[0] = mine.n, to[1] = mine.mean, to[2] = mine.m2;
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) {
      const double* other = space + 3 * (threadIdx.x + half);
      mine.merge({other[0], other[1], other[2]});
      to[0] = mine.n, to[1] = mine.mean, to[2] = mine.m2;
    }
  }
  __syncthreads();
  return mine;
}

}}}  // namespace
