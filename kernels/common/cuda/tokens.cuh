// The token-level kernels' way to their inputs: four tokens at a time, whatever the dtype and the strides, as float.
#pragma once

#include "block.cuh"
#include "common/half.h"
#include "common/reduction_kind.h"
#include "csrc/tensor.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int group = 4;          // tokens of a thread at a time
constexpr int unit_threads = 256;
constexpr int unit_size = 4096;   // tokens of one partial sum, as on the CPU: no sum depends on how a grid is cut
constexpr int short_unit = 1024;  // of a launch of so few tokens that longer ones would leave multiprocessors without any

// Tokens of a block where rows do not matter: a matter of their number alone.
__host__ __device__ __forceinline__ int64_t flat_unit(int64_t tokens) { return tokens < 512 * short_unit ? short_unit : unit_size; }

__device__ __forceinline__ float element(const Array& a, int64_t at) {
  switch (a.dtype) {
    case DType::f32: return static_cast<const float*>(a.data)[at];
    case DType::bf16: return bf16_to_float(static_cast<const uint16_t*>(a.data)[at]);
    case DType::f16: return half_to_float(static_cast<const uint16_t*>(a.data)[at]);
    case DType::f64: return static_cast<float>(static_cast<const double*>(a.data)[at]);
    case DType::i32: return static_cast<float>(static_cast<const int32_t*>(a.data)[at]);
    case DType::i64: return static_cast<float>(static_cast<const int64_t*>(a.data)[at]);
    default: return static_cast<float>(static_cast<const uint8_t*>(a.data)[at]);
  }
}

// n (at most 4) elements from `at` on, zeros after.
__device__ __forceinline__ void load_run(const Array& a, int64_t at, int64_t stride, int n, float (&x)[group]) {
  if (stride == 1 && n == group) {
    if (a.dtype == DType::f32) {
      const float* p = static_cast<const float*>(a.data) + at;
      if ((reinterpret_cast<uintptr_t>(p) & 15) == 0) {
        const Bytes16 b = load_plain(p);
        memcpy(x, &b, 16);
        return;
      }
    } else if (a.dtype == DType::u8) {
      const uint8_t* p = static_cast<const uint8_t*>(a.data) + at;
      if ((reinterpret_cast<uintptr_t>(p) & 3) == 0) {
        const uint32_t b = *reinterpret_cast<const uint32_t*>(p);
#pragma unroll
        for (int i = 0; i < group; ++i) x[i] = static_cast<float>((b >> (8 * i)) & 0xffu);
        return;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < group; ++i) x[i] = i < n ? element(a, at + i * stride) : 0.f;
}

__device__ __forceinline__ void store_run(float* to, int n, const float (&x)[group]) {
  if (n == group && (reinterpret_cast<uintptr_t>(to) & 15) == 0) {
    Bytes16 b;
    memcpy(&b, x, 16);
    store_streaming(to, b);
    return;
  }
#pragma unroll
  for (int i = 0; i < group; ++i) if (i < n) to[i] = x[i];
}

// Where a kernel is: in one row, or anywhere in all tokens, row after row (`flat`).
struct Place {
  const Rows* rows;
  int64_t row;
  bool flat;

  __device__ int64_t size() const { return flat ? rows->total() : rows->size(row); }
  __device__ int64_t start() const { return flat ? 0 : rows->start(row); }  // in a contiguous output

  // Tokens [t, t + n), n <= 4.
  __device__ void load(const Array& a, int64_t t, int n, float (&x)[group]) const {
    if (!flat) return load_run(a, rows->offset(a, row, t), a.per_row ? 0 : a.col_stride, n, x);
    const int64_t length = rows->length;
    if (!a.per_row && (rows->cu_seqlens || a.row_stride == length * a.col_stride)) return load_run(a, t * a.col_stride, a.col_stride, n, x);
#pragma unroll
    for (int i = 0; i < group; ++i) {
      const int64_t b = (t + i) / length;
      x[i] = i < n ? element(a, rows->offset(a, b, t + i - b * length)) : 0.f;
    }
  }
  __device__ float at(const Array& a, int64_t t) const { return element(a, rows->offset(a, row, t)); }  // not flat
  __device__ void load_mask(const Array& mask, int64_t t, int n, float (&x)[group]) const {
    if (mask) return load(mask, t, n, x);
#pragma unroll
    for (int i = 0; i < group; ++i) x[i] = i < n ? 1.f : 0.f;
  }
};

// One value of a (B) input.
__device__ __forceinline__ float row_element(const Array& a, int64_t b) { return element(a, b * a.row_stride); }

// T, or the longest segment of a pack, by the whole block; 0 where the reduction does not ask. `space`: a double for each warp.
__device__ __forceinline__ int64_t longest_row(Reduction reduction, const Rows& rows, double* space) {
  if (reduction != Reduction::seq_mean_token_sum_norm) return 0;
  if (!rows.cu_seqlens) return rows.length;
  int64_t longest[1] = {0};
  for (int64_t b = threadIdx.x; b < rows.count; b += blockDim.x) longest[0] = rows.size(b) > longest[0] ? rows.size(b) : longest[0];
  block_reduce(longest, space, [](int, int64_t x, int64_t y) { return y > x ? y : x; });
  return longest[0];
}

inline int64_t units_of(int64_t tokens, int64_t unit = unit_size) { return (tokens + unit - 1) / unit; }

}}}  // namespace
