// What a thread does with its part of a tile of logits: 128 of the 64 x 256 accumulators that a warpgroup's product leaves in
// registers, half of them in each of two rows. A row lies in the 4 lanes of a quad.
#pragma once

#include "common/cuda/block.cuh"
#include "common/cuda/tile_layout.h"
#include "linear_logprobs/cuda_args.h"
#include "logprobs/row.cuh"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int row_part = fragment_size / 2;

struct alignas(8) Bytes8 { float x, y; };

// The e-th of the 64 in one of the thread's two rows, which lies e_column(e) to the right of the thread's first.
FASTRLHF_HOST_DEVICE constexpr int fragment_index(int half, int e) { return 4 * (e / 2) + 2 * half + e % 2; }
FASTRLHF_HOST_DEVICE constexpr int e_column(int e) { return 8 * (e / 2) + e % 2; }

__device__ __forceinline__ int64_t counted_rows(const LinearLogprobsArgs& a) {
  if (!a.row_count) return a.forward.rows;
  const int64_t n = a.row_count_dtype == DType::i32 ? *static_cast<const int32_t*>(a.row_count) : *static_cast<const int64_t*>(a.row_count);
  return n < 0 ? 0 : n < a.forward.rows ? n : a.forward.rows;
}

__device__ __forceinline__ float bias_at(const LinearLogprobsArgs& a, int column) {
  switch (a.bias_dtype) {
    case DType::bf16: return to_float(static_cast<const bf16*>(a.bias)[column]);
    case DType::f16: return to_float(static_cast<const half*>(a.bias)[column]);
    default: return static_cast<const float*>(a.bias)[column];
  }
}

// The thread's logits in one of its rows, `first` being the column of the first: -inf past the vocabulary, which is no logit at all.
template <bool Plain>
__device__ __forceinline__ void logits_of(const LinearLogprobsArgs& a, const float (&d)[fragment_size], int half, int first, float (&x)[row_part]) {
  const int vocab = static_cast<int>(a.forward.vocab);
  const float cap = static_cast<float>(a.forward.softcap);
#pragma unroll
  for (int e = 0; e < row_part; ++e) {
    x[e] = d[fragment_index(half, e)];
    if (!Plain) {
      if (a.bias && first + e_column(e) < vocab) x[e] += bias_at(a, first + e_column(e));
      x[e] = soft_capped(x[e], cap);
    }
  }
  if (first + e_column(row_part - 1) < vocab) return;
#pragma unroll
  for (int e = 0; e < row_part; ++e)
    if (first + e_column(e) >= vocab) x[e] = -INFINITY;
}

__device__ __forceinline__ float highest_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(all_lanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(all_lanes, x, 2));
}
__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(all_lanes, x, 1);
  return x + __shfl_xor_sync(all_lanes, x, 2);
}

// Four words a lane, turned around among the 4 lanes of a quad: lane q ends with the q-th of each.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane_id() & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(all_lanes, upper ? w[i] : w[i | bit], bit);
      if (upper) w[i] = got;
      else w[i | bit] = got;
    }
  }
}

__device__ __forceinline__ uint32_t packed(float low, float high) {
  bf16 a, b;
  round_to(low, a);
  round_to(high, b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}

// The thread's part of a row to where the row's columns from `tile` on lie: 16 bytes a lane in bfloat16, 32 a quad in float32. All
// lanes of a warp come here together.
__device__ __forceinline__ void store_part(bf16* out, const float (&x)[row_part], int tile, int vocab, bool wanted) {
  const int lane = lane_id() % 4;
#pragma unroll
  for (int block = 0; block < 8; ++block) {  // of 32 columns: 8 in a row for each lane
    uint32_t w[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) w[j] = packed(x[8 * block + 2 * j], x[8 * block + 2 * j + 1]);
    transpose_quad(w);
    const int column = tile + 32 * block + 8 * lane;
    if (!wanted) continue;
    if (column + 8 <= vocab) {
      *reinterpret_cast<Bytes16*>(out + column) = {{w[0], w[1], w[2], w[3]}};
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (column + i < vocab) out[column + i].bits = static_cast<uint16_t>(w[i / 2] >> 16 * (i % 2));
    }
  }
}
__device__ __forceinline__ void store_part(float* out, const float (&x)[row_part], int tile, int vocab, bool wanted) {
  if (!wanted) return;
#pragma unroll
  for (int e = 0; e < row_part; e += 2) {
    const int column = tile + 2 * (lane_id() % 4) + e_column(e);
    if (column + 2 <= vocab) {
      *reinterpret_cast<Bytes8*>(out + column) = {x[e], x[e + 1]};
    } else if (column < vocab) {
      out[column] = x[e];
    }
  }
}

// The statistics of a part of the vocabulary, for a thread's two rows. Keep: the exponentials too, in x, relative to a maximum that the
// quad shares.
template <bool Plain, bool Keep>
struct PartStatistics {
  struct Row {
    RowState state;
    float c, label;
    int y;  // the label's column here, or -1
  } rows[2];

  __device__ __forceinline__ void begin(const LinearLogprobsArgs& a, int64_t row, int64_t count) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Row& r = rows[h];
      const int64_t at = row + 8 * h;
      r = Row{};
      r.c = log2e, r.label = -INFINITY, r.y = -1;
      if (at >= count) continue;
      r.c = static_cast<float>(scale_of(a.forward, at) * static_cast<double>(log2e));
      r.y = static_cast<int>(label_column(a.forward, at, 0));
    }
  }

  // Row h of a tile from column `tile` on.
  __device__ __forceinline__ void add(const LinearLogprobsArgs& a, const float (&d)[fragment_size], int h, int tile, float (&x)[row_part]) {
    Row& r = rows[h];
    const int first = tile + 2 * (lane_id() % 4), y = r.y - first;
    logits_of<Plain>(a, d, h, first, x);
    if (r.y >= 0 && y >= 0 && y <= e_column(row_part - 1)) {
#pragma unroll
      for (int e = 0; e < row_part; ++e)
        if (y == e_column(e)) r.label = x[e];
    }
    if (Keep) keep(r, x);
    else r.state.template add<true>(x, r.c);
  }

  __device__ __forceinline__ static void keep(Row& r, float (&x)[row_part]) {
    float high = r.state.max;
#pragma unroll
    for (int e = 0; e < row_part; ++e) high = fmaxf(high, x[e]);
    r.state.move(highest_of_quad(high), r.c);
    const float from = r.state.max == -INFINITY ? 0.f : r.state.max;
    float sum = 0.f, weighted = 0.f;
#pragma unroll
    for (int e = 0; e < row_part; ++e) {
      const float u = (x[e] - from) * r.c;
      x[e] = exp2_fast(u);
      sum += x[e];
      weighted = fmaf(x[e], fmaxf(u, -200.f), weighted);
    }
    r.state.sum += sum, r.state.weighted += weighted;
  }

  // The quad's lanes merged; all 4 have the result.
  __device__ __forceinline__ void end(const LinearLogprobsArgs& a, int64_t part, int64_t row, int64_t count) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Row& r = rows[h];
      const float high = highest_of_quad(r.state.max);
      r.state.move(high, r.c);
      const float sum = sum_of_quad(r.state.sum), weighted = sum_of_quad(r.state.weighted) * ln2, label = highest_of_quad(r.label);
      const int64_t at = row + 8 * h;
      if (at >= count || lane_id() % 4 != 0) continue;
      float* out = static_cast<float*>(a.forward.partials) + 4 * (part * a.forward.rows + at);
      out[0] = high, out[1] = sum, out[2] = weighted, out[3] = label;
    }
  }
};

// What a row's gradient takes, in units of log 2: dx = 2^u (constant + slope u), u = (x - max) c, and at the label + at_label.
struct GradientRow {
  float max = 0, c = 0, constant = 0, slope = 0, at_label = 0;
  int y = -1;  // the label's column here
  bool nothing = true;
};

__device__ __forceinline__ GradientRow gradient_row(const LogprobsArgs& a, const void* grad_logprobs, const void* grad_entropy, const void* grad_lse,
                                                    int64_t row, int64_t count) {
  GradientRow r;
  if (row >= count || row_ignored(a, row)) return r;
  auto value = [&](const void* p) { return p ? static_cast<const float*>(p)[row] : 0.0; };
  const double total = value(grad_logprobs), g_entropy = value(grad_entropy), g_lse = value(grad_lse), scale = scale_of(a, row);
  const RowGradient of = row_gradient(total, g_entropy, g_lse, value(a.entropies), value(a.log_sum), scale);
  r.nothing = total == 0 && g_entropy == 0 && g_lse == 0;
  r.max = static_cast<const float*>(a.max)[row];
  r.c = static_cast<float>(scale * static_cast<double>(log2e));
  r.constant = static_cast<float>(of.constant), r.slope = static_cast<float>(of.slope * static_cast<double>(ln2));
  r.at_label = static_cast<float>(total * scale);
  r.y = static_cast<int>(label_column(a, row, 0));
  return r;
}

// The gradient of the logits of a tile, for a thread's two rows: the mathematics of the backward of `logprobs`.
template <bool Plain, class S>
struct TileGradient {
  GradientRow rows[2];

  __device__ __forceinline__ void begin(const LinearLogprobsGradientArgs& g, int64_t row, int64_t count) {
#pragma unroll
    for (int h = 0; h < 2; ++h) rows[h] = gradient_row(g.linear.forward, g.grad_logprobs, g.grad_entropy, g.grad_lse, row + 8 * h, count);
  }

  __device__ __forceinline__ void gradient_of(const LinearLogprobsArgs& a, const GradientRow& r, int first, float (&x)[row_part]) const {
    const float cap = static_cast<float>(a.forward.softcap);
    const int y = r.y - first;
    const bool here = r.y >= 0 && y >= 0 && y <= e_column(row_part - 1);
#pragma unroll
    for (int e = 0; e < row_part; ++e) {
      const float u = (x[e] - r.max) * r.c;
      float g = exp2_fast(u) * fmaf(fmaxf(u, -200.f), r.slope, r.constant);
      if (here && y == e_column(e)) g += r.at_label;
      if (!Plain && cap != 0 && g != 0) g *= soft_cap_slope(x[e], cap, 1 / (cap * cap));
      x[e] = r.nothing ? 0.f : g;
    }
  }

  // `tile`: the tile's first column.
  __device__ __forceinline__ void add(const LinearLogprobsGradientArgs& g, const float (&d)[fragment_size], int64_t row, int tile) {
    const LogprobsArgs& a = g.linear.forward;
    const int lane = lane_id() % 4, vocab = static_cast<int>(a.vocab);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x[row_part];
      logits_of<Plain>(g.linear, d, h, tile + 2 * lane, x);
      gradient_of(g.linear, rows[h], tile + 2 * lane, x);
      const int64_t at = row + 8 * h;
      S* out = static_cast<S*>(g.grad) + at * g.grad_stride;
      store_part(out, x, tile, vocab, at < a.rows);
    }
  }
};

}}}  // namespace
