// Reductions over a warp and over a block, always in the same order: lanes by halving, then warps one after the other.
#pragma once

#include "platform.cuh"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr unsigned all_lanes = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & 31; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) >> 5; }
__device__ __forceinline__ int warp_count() { return static_cast<int>(blockDim.x) >> 5; }

struct Add { template <class T> __device__ T operator()(T a, T b) const { return a + b; } };
struct Least { template <class T> __device__ T operator()(T a, T b) const { return b < a ? b : a; } };
struct Greatest { template <class T> __device__ T operator()(T a, T b) const { return b > a ? b : a; } };

// Every lane gets the result.
template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T x, Op op) {
#pragma unroll
  for (int distance = 16; distance > 0; distance >>= 1) x = op(x, __shfl_xor_sync(all_lanes, x, distance));
  return x;
}

// N numbers at once; every thread gets the results. `space`: N doubles for each warp; free again after the next barrier.
template <int N, class T, class Reduce>
__device__ __forceinline__ void block_reduce(T (&x)[N], double* space, Reduce&& reduce) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) x[i] = reduce(i, x[i], __shfl_xor_sync(all_lanes, x[i], distance));
    if (lane_id() == 0) space[warp_id() * N + i] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    T total = static_cast<T>(space[i]);
    for (int w = 1; w < warp_count(); ++w) total = reduce(i, total, static_cast<T>(space[w * N + i]));
    x[i] = total;
  }
  __syncthreads();
}

template <int N, class T>
__device__ __forceinline__ void block_sum(T (&x)[N], double* space) {
  block_reduce(x, space, [](int, T a, T b) { return a + b; });
}

// Whether this block is the last of the launch to come here. Its threads then see what every block wrote before, and the
// counter is 0 again.
__device__ __forceinline__ bool last_block(int* counter, double* space) {
  __syncthreads();
  int* last = reinterpret_cast<int*>(space);
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicAdd(counter, 1) == static_cast<int>(gridDim.x) - 1;
    if (*last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  const bool result = *last != 0;
  __syncthreads();
  return result;
}

}}}  // namespace
