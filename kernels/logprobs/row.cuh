// A row of logits as the threads of a block (or of a cluster of blocks) share it: 16 bytes a thread at a time, by column alone, so
// that neither the row's address nor the rows beside it can change a bit.
#pragma once

#include "args.h"
#include "common/cuda/block.cuh"
#include "common/half.h"
#include "common/softmax_row.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return bf16_to_float(x.bits); }
__device__ __forceinline__ float to_float(half x) {
#if defined(FASTRLHF_CUDA_HOST)
  return half_to_float(x.bits);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}
__device__ __forceinline__ void round_to(float x, float& y) { y = x; }
__device__ __forceinline__ void round_to(float x, bf16& y) {
#if defined(FASTRLHF_CUDA_HOST)
  y.bits = float_to_bf16(x);
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
}
__device__ __forceinline__ void round_to(float x, half& y) {
#if defined(FASTRLHF_CUDA_HOST)
  y.bits = float_to_half(x);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
}

template <class S> constexpr int chunk = 16 / static_cast<int>(sizeof(S));  // elements in 16 bytes
constexpr float log2e = 1.44269504088896340736f, ln2 = 0.693147180559945309417f;

// The statistics of softmax_row.h in float and in units of log 2: u = (x - max) c, c = log2(e) / T.
struct RowState {
  float max = -INFINITY, sum = 0.f, weighted = 0.f;

  __device__ __forceinline__ void move(float to, float c) {
    if (max == to) return;
    if (sum != 0) {
      const float shift = (max - to) * c;
      move_sums(shift, exp2_fast(shift), sum, weighted);
    }
    max = to;
  }
  // n floats
  template <bool Entropy, int n>
  __device__ __forceinline__ void add(const float (&x)[n], float c) {
    float high = x[0];
#pragma unroll
    for (int i = 1; i < n; ++i) high = fmaxf(high, x[i]);
    if (high > max) move(high, c);
    const float from = max == -INFINITY ? 0.f : max;  // all -inf so far: their terms are 0; a NaN's is NaN
    float s = 0.f, t = 0.f;  // apart at first: shorter chains of additions
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float u = (x[i] - from) * c, e = exp2_fast(u);
      s += e;
      if (Entropy) t = fmaf(e, fmaxf(u, -200.f), t);  // 0 * -200, never 0 * -inf
    }
    sum += s;
    if (Entropy) weighted += t;
  }
};

// Of a whole row, in units of e.
struct RowTotals {
  float max = -INFINITY;
  double sum = 0, weighted = 0;

  __device__ __forceinline__ void merge(RowTotals o, double scale) {
    const float to = o.max > max ? o.max : max;
    for (RowTotals* t : {this, &o}) {
      if (t->max == to || t->sum == 0) continue;
      const double shift = (static_cast<double>(t->max) - to) * scale;
      move_sums(shift, std::exp(shift), t->sum, t->weighted);
    }
    max = to;
    sum += o.sum, weighted += o.weighted;
  }
};

// The threads' statistics over the block, in every thread: each is moved to the common maximum once, in float, and they are added
// in double. `space`: 2 doubles for each warp.
__device__ __forceinline__ RowTotals block_totals(RowState mine, float c, double* space) {
  RowTotals all;
  float high[1] = {mine.max};
  block_reduce(high, space, [](int, float a, float b) { return b > a ? b : a; });
  all.max = high[0];
  mine.move(all.max, c);
  double sums[2] = {mine.sum, mine.weighted};
  block_sum(sums, space);
  all.sum = sums[0], all.weighted = sums[1] * static_cast<double>(ln2);
  return all;
}

__device__ __forceinline__ int64_t label_at(const LogprobsArgs& a, int64_t row, int64_t k) {
  const int64_t i = row * a.labels_per_row + k;
  return a.label_dtype == DType::i32 ? static_cast<const int32_t*>(a.labels)[i] : static_cast<const int64_t*>(a.labels)[i];
}
__device__ __forceinline__ bool row_ignored(const LogprobsArgs& a, int64_t row) {
  for (int64_t k = 0; k < a.labels_per_row; ++k)
    if (label_at(a, row, k) != a.ignore_index) return false;
  return true;
}
__device__ __forceinline__ double scale_of(const LogprobsArgs& a, int64_t row) { return 1 / (a.temperatures ? a.temperatures[row] : a.temperature); }

__device__ __forceinline__ float soft_capped(float x, float cap) { return cap == 0 ? x : cap * tanhf(x / cap); }

// The column here of label k of a row, -1 where there is none.
__device__ __forceinline__ int64_t label_column(const LogprobsArgs& a, int64_t row, int64_t k) {
  const int64_t id = label_at(a, row, k), y = id - a.vocab_start;
  return id == a.ignore_index || y < 0 || y >= a.vocab ? -1 : y;
}
__device__ __forceinline__ bool is_label(const LogprobsArgs& a, int64_t row, int64_t column) {
  for (int64_t k = 0; k < a.labels_per_row; ++k)
    if (label_column(a, row, k) == column) return true;
  return false;
}

// 16 bytes of a row from column `at` on as float, -inf past its end. Plain: neither soft cap nor kept mask. Aligned: the row
// starts at a multiple of 16 bytes. Written: this launch may be writing over the row.
template <bool Plain, bool Aligned, bool Written, class S>
__device__ __forceinline__ void load_chunk(const LogprobsArgs& a, int64_t row, const S* x, int64_t at, float (&out)[chunk<S>]) {
  if (Aligned && at + chunk<S> <= a.vocab) {
    const Bytes16 b = Written ? load_plain(x + at) : load_streaming(x + at);
    S s[chunk<S>];
    memcpy(s, &b, 16);
#pragma unroll
    for (int i = 0; i < chunk<S>; ++i) out[i] = to_float(s[i]);
  } else {
#pragma unroll
    for (int i = 0; i < chunk<S>; ++i) out[i] = at + i < a.vocab ? to_float(x[at + i]) : -INFINITY;
  }
  if (Plain) return;
  const float cap = static_cast<float>(a.softcap);
#pragma unroll
  for (int i = 0; i < chunk<S>; ++i) {
    if (at + i >= a.vocab) continue;
    out[i] = soft_capped(out[i], cap);
    if (a.kept_mask && !a.kept_mask[row * a.vocab + at + i] && !is_label(a, row, at + i)) out[i] = -INFINITY;
  }
}

template <class S>
__device__ __forceinline__ float label_logit(const LogprobsArgs& a, int64_t row, const S* x, int64_t k) {
  const int64_t y = label_column(a, row, k);
  return y < 0 ? -INFINITY : soft_capped(to_float(x[y]), static_cast<float>(a.softcap));
}

// What a row's statistics say, for the calling thread's labels k = thread, thread + threads, ...; thread 0 writes the row's own.
template <class LabelLogit>
__device__ __forceinline__ void write_row(const LogprobsArgs& a, int64_t row, const RowTotals& state, LabelLogit&& z) {
  const double scale = scale_of(a, row), sum = state.sum, log_sum = log_of_sum(sum);
  for (int64_t k = threadIdx.x; k < a.labels_per_row; k += blockDim.x)
    static_cast<float*>(a.logprobs)[row * a.labels_per_row + k] =
        label_at(a, row, k) == a.ignore_index ? 0.f : static_cast<float>(logprob_of(z(k), state.max, scale, log_sum));
  if (threadIdx.x != 0) return;
  if (a.entropies) static_cast<float*>(a.entropies)[row] = static_cast<float>(entropy_of(log_sum, state.weighted, sum));
  if (a.lse) static_cast<float*>(a.lse)[row] = static_cast<float>(state.max * scale + log_sum);
  if (a.max) static_cast<float*>(a.max)[row] = state.max;
  if (a.log_sum) static_cast<float*>(a.log_sum)[row] = static_cast<float>(log_sum);
}

__device__ __forceinline__ void write_ignored_row(const LogprobsArgs& a, int64_t row) {
  for (int64_t k = threadIdx.x; k < a.labels_per_row; k += blockDim.x) static_cast<float*>(a.logprobs)[row * a.labels_per_row + k] = 0.f;
  if (threadIdx.x != 0) return;
  for (void* p : {a.entropies, a.lse, a.max, a.log_sum})
    if (p) static_cast<float*>(p)[row] = 0.f;
}

}}}  // namespace
