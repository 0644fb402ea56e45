// One row's softmax statistics in one read: the maximum m, s = sum e^((x-m)/T), and t = sum ((x-m)/T) e^((x-m)/T).
//
// Blocks (2048 elements with 16 lanes) are summed relative to the highest logit of the blocks before; the block's own maximum is taken on the way,
// and a block that rises more than a factor of two above is summed again from cache (a few blocks a row). Two visits
// to every block, for the maximum and for the exponentials, cost 10 to 20 % more on a machine whose memory keeps up.
// A block is summed in single precision, the row in double.
//
// The exponent is one fused multiply-subtract: with c = log2(e) / T and k = m c, each rounded once to a float, x c - k
// is exact before its own rounding whatever offset the logits carry, so e^((x-m)/T) is taken relative to k / c, which
// is m to within rounding and is known exactly.
#pragma once

#include <cmath>
#include <type_traits>

#include "convert.h"
#include "softmax_row.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int64_t block_size = 128 * F32::W;  // so that a lane never sums more than 128 terms (256 without entropy)
constexpr double log2e = 1.4426950408889634;

// 2^(x c - k), the reference point in units of x being k / c.
template <class T>
struct Exponent {
  T c, k, max;
  double reference;
  bool fused;  // false: x c - k would round twice, or a rounding of k be so large that 2^(x c - k) is no float: the difference first

  Exponent(T max_, double scale) : c(static_cast<T>(scale * log2e)), k(max_ * c), max(max_) {
    fused = VectorOf<T>::type::fuses && std::abs(k) < T(1 << 22);
    reference = fused ? static_cast<double>(k) / c : static_cast<double>(max);
  }
  template <bool Fused, class V>
  static V of(V x, V c_, V k_) { return Fused ? fms(x, c_, k_) : (x - k_) * c_; }
  T offset() const { return fused ? k : max; }
};

template <class T>
struct RowStats {
  T max = -INFINITY, base = -INFINITY;  // base: the logit that the sums are relative to, before rounding
  double reference = -INFINITY, sum = 0, weighted = 0;

  // The sums relative to another reference point.
  void move(double to, double scale) {
    if (sum != 0 && to != reference) {
      const double shift = (reference - to) * scale;
      const double factor = std::abs(shift) < 1e-4 ? 1 + shift * (1 + shift * 0.5) : std::exp(shift);
      move_sums(shift, factor, sum, weighted);
    }
    reference = to;
  }
};

template <class T>
inline bool any_nan(const T* x, int64_t n) {
  bool nan = false;
  for (int64_t i = 0; i < n; ++i) nan |= !(to_compute(x[i]) == to_compute(x[i]));
  return nan;
}

// The maximum of n elements, n in whole pairs of vectors; NaN is passed over.
template <class S>
inline typename ComputeOf<S>::type highest_of(const S* x, int64_t n) {
  using V = typename VectorOf<typename ComputeOf<S>::type>::type;
  V a = V::set(-INFINITY), b = a, v, w;
  for (int64_t i = 0; i < n; i += 2 * V::W) {
    load_pair(x + i, v, w);
    a = max(v, a);
    b = max(w, b);
  }
  return highest(max(a, b));
}

template <class T>
struct BlockSums { T high; double sum, weighted; };

// n elements, whole pairs of vectors.
template <bool Entropy, bool Fused, class S, class T>
inline BlockSums<T> sum_block(const S* x, int64_t n, const Exponent<T>& exponent) {
  using V = typename VectorOf<T>::type;
  const V c = V::set(exponent.c), k = V::set(exponent.offset()), floor_ = V::set(-200);  // 0 * t, never 0 * -inf
  V s0 = V::set(0), s1 = s0, t0 = s0, t1 = s0, h0 = V::set(-INFINITY), h1 = h0, a, b;
  for (int64_t i = 0; i < n; i += 2 * V::W) {
    for (int64_t j = 0; j < 2 * V::W; j += 64 / sizeof(S)) __builtin_prefetch(x + i + j + 4096 / sizeof(S), 0, 3);
    load_pair(x + i, a, b);
    h0 = max(a, h0);
    h1 = max(b, h1);
    a = Exponent<T>::template of<Fused>(a, c, k);
    b = Exponent<T>::template of<Fused>(b, c, k);
    const V e0 = exp2(a), e1 = exp2(b);
    s0 = s0 + e0;
    s1 = s1 + e1;
    if (Entropy) {
      t0 = fma(e0, max(floor_, a), t0);
      t1 = fma(e1, max(floor_, b), t1);
    }
  }
  return {highest(max(h0, h1)), static_cast<double>(sum(s0 + s1)), Entropy ? sum(t0 + t1) * (1 / log2e) : 0};
}

// Adds n elements (whole pairs of vectors).
template <bool Entropy, class S, class T>
inline void add_block(RowStats<T>& stats, const S* x, int64_t n, double scale) {
  auto sums = [&](T reference) {
    const Exponent<T> e(reference, scale);
    stats.move(e.reference, scale);
    return e.fused ? sum_block<Entropy, true>(x, n, e) : sum_block<Entropy, false>(x, n, e);
  };
  if (stats.base == -INFINITY) {  // nothing but -inf so far
    stats.base = stats.max = highest_of(x, n);
    if (stats.base == -INFINITY) {
      if (any_nan(x, n)) stats.sum = stats.weighted = NAN;
      return;
    }
  }
  BlockSums<T> block = sums(stats.base);
  if (block.high > stats.max) stats.max = block.high;
  if ((static_cast<double>(block.high) - stats.base) * scale > 0.6931) {
    stats.base = block.high;
    block = sums(stats.base);
  }
  stats.sum += block.sum;
  stats.weighted += block.weighted;
}

template <class T>
inline T soft_capped(T x, double cap) {
  using V = typename VectorOf<T>::type;
  if (cap == 0) return x;
  return first(V::set(static_cast<T>(cap)) * tanh(V::set(x) * V::set(static_cast<T>(1 / cap))));
}

// n elements as T in `buffer`: converted, soft-capped, those outside the kept set at -inf, -inf up to whole pairs of
// vectors. Returns that size.
template <class S, class T>
inline int64_t stage(const S* x, int64_t n, double softcap, const uint8_t* kept, T* buffer) {
  using V = typename VectorOf<T>::type;
  int64_t i = 0;
  for (; i + V::W <= n; i += V::W) load_as(x + i, static_cast<V*>(nullptr)).store(buffer + i);
  for (; i < n; ++i) buffer[i] = to_compute(x[i]);
  for (; i % (2 * V::W); ++i) buffer[i] = static_cast<T>(-INFINITY);
  const int64_t size = i;
  if (softcap != 0) {
    const V cap = V::set(static_cast<T>(softcap)), inverse = V::set(static_cast<T>(1 / softcap));
    for (i = 0; i < size; i += V::W) (cap * tanh(V::load(buffer + i) * inverse)).store(buffer + i);
    for (i = n; i < size; ++i) buffer[i] = static_cast<T>(-INFINITY);
  }
  if (kept) for (i = 0; i < n; ++i) buffer[i] = kept[i] ? buffer[i] : static_cast<T>(-INFINITY);
  return size;
}

// A row as it lies: large blocks straight from memory, the rest by way of `buffer`.
template <bool Entropy, class S, class T>
inline RowStats<T> plain_row_stats(const S* x, int64_t n, double scale, T* buffer) {
  RowStats<T> stats;
  constexpr int64_t large = Entropy ? block_size : 2 * block_size;  // larger: fewer horizontal sums, longer single-precision ones
  int64_t at = 0;
  for (; at + large <= n; at += large) add_block<Entropy>(stats, x + at, large, scale);
  for (; at < n; at += block_size) {
    const int64_t size = stage(x + at, n - at < block_size ? n - at : block_size, 0, nullptr, buffer);
    add_block<Entropy>(stats, buffer, size, scale);
  }
  stats.move(stats.max, scale);
  return stats;
}

}}}  // namespace
