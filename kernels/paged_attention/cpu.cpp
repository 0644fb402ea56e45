// Keys lie transposed in a block, so that one vector holds a coordinate of 16 positions: a block's scores need no sum
// across lanes. A row's arithmetic depends on its own sequence alone: not on the batch, the tile or the thread.
#include "cpu.h"

#include <algorithm>
#include <cmath>

#include "common/convert.h"
#include "csrc/scratch.h"
#include "csrc/threads.h"

namespace fastrlhf { namespace FASTRLHF_ISA {
namespace {

constexpr int vectors = paged_block / F32::W;  // of a block's positions
constexpr int tile = 4;                        // query rows that share each load of the cache

template <class S>
struct View {
  const PagedAttentionArgs& a;
  int64_t block(int64_t token, int64_t position) const {
    return a.block_table[a.sequences[token] * a.table_width + position / paged_block];
  }
  S* keys(int64_t block, int64_t head) const {
    return static_cast<S*>(a.k_cache) + (block * a.kv_heads + head) * a.dim * paged_block;
  }
  S* values(int64_t block, int64_t head) const {
    return static_cast<S*>(a.v_cache) + (block * a.kv_heads + head) * paged_block * a.padded;
  }
};

// One token: q turned and scaled into `rotated`, k turned into the cache, v into the cache.
template <class S>
void append(const PagedAttentionArgs& a, int64_t token, float* rotated) {
  const View<S> view{a};
  const int64_t half_dim = a.dim / 2, position = a.positions[token], slot = position % paged_block;
  const float *cos = a.cos + position * half_dim, *sin = a.sin + position * half_dim;
  const S* q = static_cast<const S*>(a.q) + token * a.q_stride;
  for (int64_t h = 0; h < a.heads; ++h, q += a.dim) {
    float* to = rotated + (token * a.heads + h) * a.dim;
    for (int64_t i = 0; i < half_dim; ++i) {
      const float x = to_compute(q[i]), y = to_compute(q[i + half_dim]);
      to[i] = (x * cos[i] - y * sin[i]) * a.scale;
      to[i + half_dim] = (y * cos[i] + x * sin[i]) * a.scale;
    }
  }
  const int64_t block = view.block(token, position);
  const S* k = static_cast<const S*>(a.k) + token * a.k_stride;
  const S* v = static_cast<const S*>(a.v) + token * a.v_stride;
  for (int64_t h = 0; h < a.kv_heads; ++h, k += a.dim, v += a.dim) {
    S* keys = view.keys(block, h) + slot;
    for (int64_t i = 0; i < half_dim; ++i) {
      const float x = to_compute(k[i]), y = to_compute(k[i + half_dim]);
      keys[i * paged_block] = round_to<S, float>(x * cos[i] - y * sin[i]);
      keys[(i + half_dim) * paged_block] = round_to<S, float>(y * cos[i] + x * sin[i]);
    }
    S* values = view.values(block, h) + slot * a.padded;
    for (int64_t i = 0; i < a.dim; ++i) values[i] = v[i];
  }
}

// Two chains of additions, of even and of odd terms, hide the latency of one; every R adds in this same order.
template <int R, int Wide>
struct Chains {
  F32 even[R][Wide], odd[R][Wide];
  Chains() {
    for (int r = 0; r < R; ++r) for (int i = 0; i < Wide; ++i) even[r][i] = odd[r][i] = F32::set(0);
  }
  template <class S>
  static void add(F32 (&acc)[R][Wide], const S* row, const float* const* x, int64_t at) {
    F32 loaded[Wide];
    for (int i = 0; i < Wide; ++i) loaded[i] = load_as(row + i * F32::W, &loaded[i]);
    for (int r = 0; r < R; ++r) {
      const F32 factor = F32::set(x[r][at]);
      for (int i = 0; i < Wide; ++i) acc[r][i] = fma(factor, loaded[i], acc[r][i]);
    }
  }
};

// The scores of R rows against one block's keys, written to scores + r * stride.
template <int R, class S>
inline void score_block(const float* const* q, const S* keys, int64_t dim, float* scores, int64_t stride) {
  Chains<R, vectors> sums;
  for (int64_t d = 0; d < dim; d += 2) {  // dim is even
    sums.add(sums.even, keys + d * paged_block, q, d);
    sums.add(sums.odd, keys + (d + 1) * paged_block, q, d + 1);
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < vectors; ++i) (sums.even[r][i] + sums.odd[r][i]).store(scores + r * stride + i * F32::W);
}

// `Wide` vectors of R outputs: Σ over positions of weight · value.
template <int R, int Wide, class S>
inline void weigh(const View<S>& view, int64_t token, int64_t head, int64_t first, int64_t end, const float* scores,
                  int64_t stride, int64_t d, float* const* out, const float* inverse) {
  const int64_t padded = view.a.padded;
  Chains<R, Wide> sums;
  for (int64_t at = first; at < end; at += paged_block) {
    const S* values = view.values(view.block(token, at), head) + d;
    const int64_t count = end - at < paged_block ? end - at : paged_block;
    const float* weights[R];
    for (int r = 0; r < R; ++r) weights[r] = scores + r * stride + (at - first);
    int64_t j = 0;
    for (; j + 1 < count; j += 2) {
      sums.add(sums.even, values + j * padded, weights, j);
      sums.add(sums.odd, values + (j + 1) * padded, weights, j + 1);
    }
    if (j < count) sums.add(sums.even, values + j * padded, weights, j);
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < Wide; ++i)
      ((sums.even[r][i] + sums.odd[r][i]) * F32::set(inverse[r])).store(out[r] + d + i * F32::W);
}

// In place e^(s - max) of the scores [begin, stop), 0 in the rest of `seen`. Returns 1 / their sum.
[[gnu::noinline]] float exponentials(float* s, int64_t begin, int64_t stop, int64_t seen) {
  std::fill(s, s + begin, -INFINITY);
  std::fill(s + stop, s + seen, -INFINITY);
  F32 high = F32::set(-INFINITY), total = F32::set(0);
  for (int64_t i = 0; i < seen; i += F32::W) high = max(high, F32::load(s + i));
  const F32 top = F32::set(highest(high));
  for (int64_t i = 0; i < seen; i += F32::W) {
    const F32 w = exp2((F32::load(s + i) - top) * F32::set(1.44269504f));
    w.store(s + i);
    total = total + w;
  }
  return 1.f / sum(total);
}

// R query rows of one sequence and one kv head; row r sees the positions before limit[r].
template <int R, class S>
void attend(const View<S>& view, int64_t token, int64_t head, const float* const* q, const int64_t* limit, float* scores,
            int64_t stride, float* const* out) {
  const PagedAttentionArgs& a = view.a;
  int64_t end = 0, first = limit[0];
  for (int r = 0; r < R; ++r) {
    const int64_t begin = a.window && limit[r] > a.window ? limit[r] - a.window : 0;
    if (limit[r] > end) end = limit[r];
    if (begin < first) first = begin;
  }
  first = first / paged_block * paged_block;
  for (int64_t at = first; at < end; at += paged_block)
    score_block<R>(q, view.keys(view.block(token, at), head), a.dim, scores + (at - first), stride);
  const int64_t seen = (end - first + paged_block - 1) / paged_block * paged_block;
  float inverse[R];
  for (int r = 0; r < R; ++r) {
    const int64_t begin = a.window && limit[r] > a.window ? limit[r] - a.window : 0;
    inverse[r] = exponentials(scores + r * stride, begin - first, limit[r] - first, seen);
  }
  int64_t d = 0;
  for (; d + 2 * F32::W <= a.padded; d += 2 * F32::W)
    weigh<R, 2>(view, token, head, first, end, scores, stride, d, out, inverse);
  for (; d < a.padded; d += F32::W) weigh<R, 1>(view, token, head, first, end, scores, stride, d, out, inverse);
}

template <class S>
void run(const PagedAttentionArgs& a) {
  const View<S> view{a};
  const int64_t group = a.heads / a.kv_heads;
  // Tiles of consecutive tokens of one sequence.
  const int64_t most = group >= tile ? 1 : tile / group;
  Scratch<int64_t> starts(a.tokens + 1, Uninitialized{});
  int64_t tiles = 0, longest = 0, visits = 0;
  for (int64_t t = 0; t < a.tokens; ++t) {
    if (t == 0 || a.sequences[t] != a.sequences[t - 1] || t - starts[tiles - 1] == most) starts[tiles++] = t;
    if (a.positions[t] >= longest) longest = a.positions[t] + 1;
    visits += a.positions[t] + 1;
  }
  starts[tiles] = a.tokens;
  const int workers = worthwhile(a.threads, visits * a.heads * a.dim / 4);
  Scratch<float> rotated(a.tokens * a.heads * a.dim, Uninitialized{});
  parallel_for(a.tokens, workers, [&](int64_t token, int) { append<S>(a, token, rotated.get()); });

  const int64_t stride = (longest + 2 * paged_block) / paged_block * paged_block;
  const int64_t held = tile * (stride + a.padded);
  Scratch<float> space(workers * held, Uninitialized{});
  // Head by head: neighbours in a tile list often share a prompt, whose blocks are then still in cache.
  parallel_for(tiles * a.kv_heads, workers, [&](int64_t task, int worker) {
    const int64_t head = task / tiles, from = starts[task % tiles], to = starts[task % tiles + 1];
    float* scores = space.get() + worker * held;
    float* results = scores + tile * stride;
    const int64_t rows = (to - from) * group;
    for (int64_t row = 0; row < rows;) {
      const float* q[tile];
      float* out[tile];
      int64_t limit[tile], where[tile];
      const int64_t count = rows - row < tile ? rows - row : tile;
      for (int64_t r = 0; r < tile; ++r) {  // three are computed as four, the last twice: the cache is read as often
        const int64_t i = row + (r < count ? r : count - 1), token = from + i / group;
        where[r] = (token * a.heads + head * group + i % group) * a.dim;
        q[r] = rotated.get() + where[r];
        out[r] = results + r * a.padded;
        limit[r] = a.positions[token] + 1;
      }
      switch (count) {
        case 1: attend<1>(view, from, head, q, limit, scores, stride, out); break;
        case 2: attend<2>(view, from, head, q, limit, scores, stride, out); break;
        default: attend<4>(view, from, head, q, limit, scores, stride, out);
      }
      for (int64_t r = 0; r < count; ++r)
        for (int64_t d = 0; d < a.dim; ++d) static_cast<S*>(a.out)[where[r] + d] = round_to<S, float>(out[r][d]);
      row += count;
    }
  });
}

}  // namespace

void paged_attention(const PagedAttentionArgs& a) {
  switch (a.dtype) {
    case DType::bf16: return run<bf16>(a);
    case DType::f16: return run<half>(a);
    default: return run<float>(a);
  }
}

}}  // namespace
