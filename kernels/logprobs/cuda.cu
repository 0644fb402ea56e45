#include "cuda.h"

#include <type_traits>

#include "row.cuh"

// A block takes a row at a time, each thread 16 bytes of it at a time with statistics of its own; merged in a fixed order. How many
// threads share a row depends on its length alone.

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int most_threads = 512;
constexpr int in_flight = 4;  // loads of 16 bytes that a thread has under way

// f(k-th kept column) of a CSR set, by the threads of the block in turn, then the labels that it does not hold, once each.
template <class Visit>
__device__ __forceinline__ void for_each_kept(const LogprobsArgs& a, int64_t row, Visit&& visit) {
  const int64_t begin = a.kept_indptr[row], end = a.kept_indptr[row + 1];
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const int64_t column = a.kept_indices[i] - a.vocab_start;
    if (column >= 0 && column < a.vocab) visit(column);
  }
  for (int64_t k = 0; k < a.labels_per_row; ++k) {
    const int64_t y = label_column(a, row, k);
    bool known = y < 0;
    for (int64_t j = 0; j < k; ++j) known = known || label_column(a, row, j) == y;
    if (!known)
      for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) known = known || a.kept_indices[i] - a.vocab_start == y;
    if (!__syncthreads_or(known) && threadIdx.x == 0) visit(y);
  }
}

template <bool Entropy, bool Plain, bool Aligned, class S>
__device__ __forceinline__ RowState row_state(const LogprobsArgs& a, int64_t row, const S* x, float c) {
  RowState state;
  const int64_t step = static_cast<int64_t>(blockDim.x) * chunk<S>;
  for (int64_t at = threadIdx.x * chunk<S>; at < a.vocab; at += in_flight * step) {
    float v[in_flight][chunk<S>];
#pragma unroll
    for (int j = 0; j < in_flight; ++j) load_chunk<Plain, Aligned, false>(a, row, x, at + j * step, v[j]);
#pragma unroll
    for (int j = 0; j < in_flight; ++j) state.template add<Entropy>(v[j], c);
  }
  return state;
}

template <class S, bool Entropy, bool Plain, bool Aligned>
__global__ void __launch_bounds__(most_threads, Plain || Aligned ? 2 : 1) forward_kernel(LogprobsArgs a) {
  double* space = reinterpret_cast<double*>(block_memory());
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const int64_t width = 3 + a.labels_per_row;
    float* partial = a.partial ? static_cast<float*>(a.partials) + row * width : nullptr;
    if (row_ignored(a, row)) {
      if (!partial) write_ignored_row(a, row);
      else for (int64_t i = threadIdx.x; i < width; i += blockDim.x) partial[i] = 0.f;
      continue;
    }
    const S* x = static_cast<const S*>(a.logits.data) + a.logits.offset(row);
    const float c = static_cast<float>(scale_of(a, row) * static_cast<double>(log2e));
    RowState state;
    if (!Plain && a.kept_indptr) {
      for_each_kept(a, row, [&](int64_t column) {
        const float value[1] = {soft_capped(to_float(x[column]), static_cast<float>(a.softcap))};
        state.template add<Entropy>(value, c);
      });
    } else {
      state = row_state<Entropy, Plain, Aligned>(a, row, x, c);
    }
    const RowTotals totals = block_totals(state, c, space);
    auto z = [&](int64_t k) { return label_logit(a, row, x, k); };
    if (!partial) {
      write_row(a, row, totals, z);
      continue;
    }
    for (int64_t k = threadIdx.x; k < a.labels_per_row; k += blockDim.x) partial[3 + k] = z(k);
    if (threadIdx.x == 0) partial[0] = totals.max, partial[1] = static_cast<float>(totals.sum), partial[2] = static_cast<float>(totals.weighted);
  }
}

// One row a warp. The lanes take the parts in turn, then the lanes are merged by halving: a vocabulary may come in more than a hundred
// parts (linear_logprobs), and an exponential in double precision for each of them takes its time.
__global__ void __launch_bounds__(32) combine_kernel(LogprobsCombineArgs c) {
  const LogprobsArgs& a = c.forward;
  const int64_t row = blockIdx.x, width = 3 + a.labels_per_row;
  if (row_ignored(a, row)) return write_ignored_row(a, row);
  const float* partials = static_cast<const float*>(c.partials) + row * width;
  const int64_t rank_stride = a.rows * width;
  const double scale = scale_of(a, row);
  RowTotals all;
  float label = -INFINITY;  // the first
  for (int64_t rank = lane_id(); rank < c.ranks; rank += 32) {
    const float* p = partials + rank * rank_stride;
    RowTotals one;
    one.max = p[0], one.sum = p[1], one.weighted = p[2];
    all.merge(one, scale);
    if (!(p[3] <= label)) label = p[3];
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    RowTotals other;
    other.max = __shfl_xor_sync(all_lanes, all.max, distance);
    other.sum = __shfl_xor_sync(all_lanes, all.sum, distance);
    other.weighted = __shfl_xor_sync(all_lanes, all.weighted, distance);
    all.merge(other, scale);
  }
  label = warp_reduce(label, [](float x, float y) { return !(y <= x) ? y : x; });
  write_row(a, row, all, [&](int64_t k) {
    if (k == 0) return label;
    float z = -INFINITY;
    for (int64_t rank = 0; rank < c.ranks; ++rank) {
      const float other = partials[rank * rank_stride + 3 + k];
      if (!(other <= z)) z = other;
    }
    return z;
  });
}

__device__ __forceinline__ double grad_value(const void* p, int64_t i) { return p ? static_cast<const float*>(p)[i] : 0.0; }

template <class S, bool Plain, bool Aligned>
__global__ void __launch_bounds__(most_threads, 1) backward_kernel(LogprobsBackwardArgs b) {
  const LogprobsArgs& a = b.forward;
  const int64_t K = a.labels_per_row, step = static_cast<int64_t>(blockDim.x) * chunk<S>;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const S* x = static_cast<const S*>(a.logits.data) + a.logits.offset(row);
    S* out = static_cast<S*>(b.grad.data) + b.grad.offset(row);
    double total = 0;
    const double g_entropy = grad_value(b.grad_entropy, row), g_lse = grad_value(b.grad_lse, row);
    bool nothing = g_entropy == 0 && g_lse == 0;
    for (int64_t k = 0; k < K; ++k) {
      if (label_at(a, row, k) == a.ignore_index) continue;
      const double g = grad_value(b.grad_logprobs, row * K + k);
      total += g;
      nothing = nothing && g == 0;
    }
    nothing = nothing || row_ignored(a, row);
    const bool sparse = !Plain && a.kept_indptr;
    auto store = [&](int64_t at, const float (&g)[chunk<S>]) {
      S s[chunk<S>];
#pragma unroll
      for (int i = 0; i < chunk<S>; ++i) round_to(g[i], s[i]);
      if (Aligned && at + chunk<S> <= a.vocab) {
        Bytes16 bytes;
        memcpy(&bytes, s, 16);
        store_streaming(out + at, bytes);
      } else {
#pragma unroll
        for (int i = 0; i < chunk<S>; ++i) if (at + i < a.vocab) out[at + i] = s[i];
      }
    };
    if (nothing || sparse) {
      const float zeros[chunk<S>] = {};
      for (int64_t at = threadIdx.x * chunk<S>; at < a.vocab; at += step) store(at, zeros);
      if (nothing) continue;
    }
    const double scale = scale_of(a, row);
    const RowGradient of = row_gradient(total, g_entropy, g_lse, grad_value(a.entropies, row), grad_value(a.log_sum, row), scale);
    const float m = static_cast<const float*>(a.max)[row], c = static_cast<float>(scale * static_cast<double>(log2e));
    const float constant = static_cast<float>(of.constant), slope = static_cast<float>(of.slope * static_cast<double>(ln2));
    const float cap = static_cast<float>(a.softcap);
    auto gradient = [&](float value) {
      const float u = (value - m) * c;
      return exp2_fast(u) * fmaf(fmaxf(u, -200.f), slope, constant);
    };
    auto label_part = [&](int64_t column) {
      double g = 0;
      for (int64_t k = 0; k < K; ++k)
        if (label_column(a, row, k) == column) g += grad_value(b.grad_logprobs, row * K + k);
      return static_cast<float>(g * scale);
    };
    auto chain = [&](float value, float g) {  // through the soft cap; -inf is outside the kept set
      if (cap == 0 || g == 0) return g;
      return g * soft_cap_slope(value, cap, 1 / (cap * cap));
    };
    if (sparse) {
      __syncthreads();  // the zeros first
      for_each_kept(a, row, [&](int64_t column) {
        const float value = soft_capped(to_float(x[column]), cap);
        round_to(chain(value, gradient(value) + label_part(column)), out[column]);
      });
      continue;
    }
    const int64_t y = K == 1 ? label_column(a, row, 0) : 0;
    for (int64_t at = threadIdx.x * chunk<S>; at < a.vocab; at += step) {
      float v[chunk<S>], g[chunk<S>];
      load_chunk<Plain, Aligned, true>(a, row, x, at, v);
#pragma unroll
      for (int i = 0; i < chunk<S>; ++i) g[i] = gradient(v[i]);
      if (K != 1 || (y >= at && y < at + chunk<S>)) {
#pragma unroll
        for (int i = 0; i < chunk<S>; ++i) g[i] += label_part(at + i);
      }
      if (!Plain) {
#pragma unroll
        for (int i = 0; i < chunk<S>; ++i) g[i] = chain(v[i], g[i]);
      }
      store(at, g);
    }
  }
}

inline int threads_for(int64_t vocab, int elements) {
  int threads = 32;
  while (threads < most_threads && threads * elements * in_flight < vocab) threads *= 2;
  return threads;
}

inline bool aligned_rows(const Matrix& m) {
  const int64_t bytes = element_size(m.dtype);
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.outer_stride * bytes % 16 == 0 && (m.inner == 1 || m.inner_stride * bytes % 16 == 0);
}

template <class F>
inline int with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(half{});
    default: return f(float{});
  }
}
template <class F>
inline int with_flag(bool flag, F&& f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

inline bool plain(const LogprobsArgs& a) { return a.softcap == 0 && !a.kept_mask && !a.kept_indptr; }

inline Grid grid_for(const LogprobsArgs& a, int elements) {
  const int threads = threads_for(a.vocab, elements);
  const int64_t resident = static_cast<int64_t>(processors()) * (2048 / threads);
  return {a.rows < resident ? a.rows : resident, threads, 3 * sizeof(double) * (most_threads / 32)};
}

}}}  // namespace

namespace fastrlhf { namespace cuda {

using namespace FASTRLHF_ISA;

int logprobs_forward(const LogprobsArgs& a, const Launch& l) {
  return with_type(a.logits.dtype, [&](auto s) {
    using S = decltype(s);
    return with_flag(a.entropy, [&](auto entropy) {
      return with_flag(plain(a), [&](auto plain) {
        return with_flag(aligned_rows(a.logits), [&](auto aligned) {
          return launch(forward_kernel<S, decltype(entropy)::value, decltype(plain)::value, decltype(aligned)::value>, grid_for(a, chunk<S>),
                        static_cast<cudaStream_t>(l.stream), a);
        });
      });
    });
  });
}

int logprobs_combine(const LogprobsCombineArgs& c, const Launch& l) {
  return launch(combine_kernel, {c.forward.rows, 32}, static_cast<cudaStream_t>(l.stream), c);
}

int logprobs_backward(const LogprobsBackwardArgs& b, const Launch& l) {
  const LogprobsArgs& a = b.forward;
  return with_type(a.logits.dtype, [&](auto s) {
    using S = decltype(s);
    return with_flag(plain(a), [&](auto plain) {
      return with_flag(aligned_rows(a.logits) && aligned_rows(b.grad), [&](auto aligned) {
        return launch(backward_kernel<S, decltype(plain)::value, decltype(aligned)::value>, grid_for(a, chunk<S>),
                      static_cast<cudaStream_t>(l.stream), b);
      });
    });
  });
}

}}  // namespace
