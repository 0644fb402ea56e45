// Products of matrices in panels, for kernels that do something to each tile of a product while it is in registers and cache.
//
// A(M, K) B(K, N): A lies in panels of `MR` rows, [k][MR], B in panels of `NR` columns, [k][NR], both converted once on the way
// in. A tile of MR x NR is summed over k in runs of 64, each in single precision from zero, the runs one after another, in the
// precision of the tile: a product's bits depend on its row, its column and K, not on how many rows or columns come with it,
// nor on the threads.
//
// With AVX-512-BF16 a product of two bf16 matrices keeps its operands in pairs, [k / 2][MR or NR], and multiplies two k at a
// time, exactly, into float accumulators.
#pragma once

#include <algorithm>

#include "convert.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

// Rows of A and columns of B in a tile, by what the registers hold: 24 accumulators of 32, or 12 of 16.
template <class T>
struct TileOf {
  using V = typename VectorOf<T>::type;
  static constexpr int64_t NR = 2 * V::W;
#if FASTRLHF_ISA_LEVEL >= 2
  static constexpr int64_t MR = 12;
#else
  static constexpr int64_t MR = 6;
#endif
};

constexpr int64_t run_length = 64;  // of k, summed before it is added to the rest

inline int64_t panels_of(int64_t n, int64_t width) { return (n + width - 1) / width; }

// One panel: `width` of `count` vectors (rows of A or columns of B; missing ones are 0), each K long.
// element(i, k) = source[i][k * k_stride]; out [K][width].
template <class T, class S>
inline void pack_panel(const S* const* source, int64_t count, int64_t width, int64_t K, int64_t k_stride, T* out) {
  for (int64_t i = count; i < width; ++i)
    for (int64_t k = 0; k < K; ++k) out[k * width + i] = 0;
  constexpr int64_t block = 64;  // of k: the lines being written stay in cache while the vectors take turns
  for (int64_t begin = 0; begin < K; begin += block) {
    const int64_t end = std::min(K, begin + block);
    for (int64_t i = 0; i < count; ++i) {
      const S* p = source[i];
      for (int64_t k = begin; k < end; ++k) out[k * width + i] = to_compute(p[k * k_stride]);
    }
  }
}

// The same where a vector's neighbours lie beside it: element(i, k) = row(k)[i], a row being `S const*`.
template <class T, class Row>
inline void pack_panel_across(Row&& row, int64_t count, int64_t width, int64_t K, T* out) {
  using V = typename VectorOf<T>::type;
  for (int64_t k = 0; k < K; ++k, out += width) {
    const auto* p = row(k);
    int64_t i = 0;
    for (; i + V::W <= count; i += V::W) load_as(p + i, static_cast<V*>(nullptr)).store(out + i);
    for (; i < count; ++i) out[i] = to_compute(p[i]);
    for (; i < width; ++i) out[i] = 0;
  }
}

// to[lane] = or += x[lane], in the precision of `to`.
template <class V>
inline void put(typename V::T* to, V x, bool add) { (add ? V::load(to) + x : x).store(to); }
inline void put(double* to, F32 x, bool add) {
  if (!add) std::fill(to, to + F32::W, 0.0);
  accumulate(to, x);
}

// Memory that a product will read soon, fetched a few lines a run. The processor's own prefetching stops at each page and loses
// count of the panels; a panel of B that waits in the cache when its turn comes made the products a seventh faster (AVX2).
struct Ahead {
  const char* at = nullptr;
  int64_t lines = 0;  // a run
  void fetch() {
    for (int64_t i = 0; i < lines; ++i, at += 64) __builtin_prefetch(at);
  }
};

// tile (MR, NR) = or += the product of two panels over K. Sum: T, or double.
template <class T, class Sum>
inline void multiply_panels(const T* a, const T* b, int64_t K, Sum* tile, bool add, Ahead& ahead) {
  using V = typename VectorOf<T>::type;
  constexpr int64_t MR = TileOf<T>::MR, NR = TileOf<T>::NR;
  for (int64_t begin = 0; begin < K || begin == 0; begin += run_length) {
    const int64_t n = std::min(run_length, K - begin);
    ahead.fetch();
    V c[MR][2];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) c[i][0] = c[i][1] = V::set(0);
#pragma GCC unroll 2
    for (int64_t k = 0; k < n; ++k, a += MR, b += NR) {
      const V b0 = V::load(b), b1 = V::load(b + V::W);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const V x = V::set(a[i]);
        c[i][0] = fma(x, b0, c[i][0]);
        c[i][1] = fma(x, b1, c[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      put(tile + i * NR, c[i][0], add);
      put(tile + i * NR + V::W, c[i][1], add);
    }
    add = true;
  }
}

#if FASTRLHF_ISA_LEVEL == 3
using Pair = uint32_t;  // two bf16, the first below

// As pack_panel, [K / 2 rounded up][width] pairs.
inline void pack_pairs(const bf16* const* source, int64_t count, int64_t width, int64_t K, Pair* out) {
  const int64_t whole = K / 2;
  for (int64_t i = count; i < width; ++i)
    for (int64_t k = 0; k < (K + 1) / 2; ++k) out[k * width + i] = 0;
  constexpr int64_t block = 64;
  for (int64_t begin = 0; begin < whole; begin += block) {
    const int64_t end = std::min(whole, begin + block);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = begin; k < end; ++k) std::memcpy(out + k * width + i, source[i] + 2 * k, sizeof(Pair));
  }
  if (K % 2)
    for (int64_t i = 0; i < count; ++i) out[whole * width + i] = source[i][K - 1].bits;
}

inline __m512i pairs_of(F32 below, F32 above) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(pack_bf16(below)), _mm512_slli_epi32(_mm512_cvtepu16_epi32(pack_bf16(above)), 16));
}

// As pack_panel_across.
template <class Row>
inline void pack_panel_across(Row&& row, int64_t count, int64_t width, int64_t K, Pair* out) {
  for (int64_t k = 0; k < K; k += 2, out += width) {
    const bf16 *p = row(k), *q = k + 1 < K ? row(k + 1) : nullptr;
    for (int64_t i = 0; i < count; ++i) out[i] = p[i].bits | static_cast<Pair>(q ? q[i].bits : 0) << 16;
    std::fill(out + count, out + width, Pair(0));
  }
}

template <class Sum>
inline void multiply_panels(const Pair* a, const Pair* b, int64_t pairs, Sum* tile, bool add, Ahead& ahead) {
  constexpr int64_t MR = TileOf<float>::MR, NR = TileOf<float>::NR;
  for (int64_t begin = 0; begin < pairs || begin == 0; begin += run_length / 2) {
    const int64_t n = std::min(run_length / 2, pairs - begin);
    ahead.fetch();
    __m512 c[MR][2];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) c[i][0] = c[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; ++k, a += MR, b += NR) {
      const auto b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 16);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const auto x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i]));
        c[i][0] = _mm512_dpbf16_ps(c[i][0], x, b0);
        c[i][1] = _mm512_dpbf16_ps(c[i][1], x, b1);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      put(tile + i * NR, F32{c[i][0]}, add);
      put(tile + i * NR + 16, F32{c[i][1]}, add);
    }
    add = true;
  }
}
#endif

// How a type of product keeps its operands: as T, K of them, or as pairs.
template <class E> inline int64_t units_of(int64_t K) { return K; }
#if FASTRLHF_ISA_LEVEL == 3
template <> inline int64_t units_of<Pair>(int64_t K) { return (K + 1) / 2; }
#endif

// A tile (columns, NR) of one product as operand of the next: of a sum over its columns, as B, [column][NR] ...
template <class T>
inline void keep_as_rows(const T* tile, int64_t columns, T* out) { std::copy(tile, tile + columns * TileOf<T>::NR, out); }

// ... and of a sum over its lanes, as A: out [lane][MR] for MR columns, of which `columns` are there.
template <class T>
inline void keep_as_columns(const T* tile, int64_t columns, T* out) {
  constexpr int64_t MR = TileOf<T>::MR, NR = TileOf<T>::NR;
  for (int64_t j = 0; j < NR; ++j)
    for (int64_t i = 0; i < MR; ++i) out[j * MR + i] = i < columns ? tile[i * NR + j] : T(0);
}

#if FASTRLHF_ISA_LEVEL == 3
inline void keep_as_rows(const float* tile, int64_t columns, Pair* out) {
  constexpr int64_t NR = TileOf<float>::NR;
  for (int64_t i = 0; i < columns; i += 2)
    for (int64_t j = 0; j < NR; j += 16)
      _mm512_storeu_si512(out + i / 2 * NR + j, pairs_of(F32::load(tile + i * NR + j), i + 1 < columns ? F32::load(tile + (i + 1) * NR + j) : F32::set(0)));
}

inline void keep_as_columns(const float* tile, int64_t columns, Pair* out) {
  constexpr int64_t MR = TileOf<float>::MR, NR = TileOf<float>::NR;
  alignas(64) Pair rows[MR][NR / 2] = {};
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = 0; j < NR; j += 16) store_as(reinterpret_cast<bf16*>(rows[i]) + j, F32::load(tile + i * NR + j));
  for (int64_t j = 0; j < NR / 2; ++j)
    for (int64_t i = 0; i < MR; ++i) out[j * MR + i] = rows[i][j];
}
#endif

// Panels of A that stay in the second-level cache while the panels of B pass.
template <class T, class E>
inline int64_t panels_in_cache(int64_t K) {
  const int64_t bytes = TileOf<T>::MR * units_of<E>(K) * static_cast<int64_t>(sizeof(E));
  return std::max<int64_t>(1, std::min<int64_t>(8, (400 << 10) / std::max<int64_t>(bytes, 1)));
}

constexpr int64_t most_panels = 8;

// Units of k of a panel of B that stay near while it meets the panels of A.
constexpr int64_t near_units = 1024;

// The products of `count` panels of A, `a_stride` apart, and one panel of B, over so many units: tiles, count of (MR, NR), = or +=.
// What will be read next begins at `next` and is as long as this panel of B; null: nothing.
template <class T, class E, class Sum>
inline void multiply_panels_by_one(const E* a, int64_t count, int64_t a_stride, const E* b, int64_t units, Sum* tiles, bool add, const E* next) {
  constexpr int64_t MR = TileOf<T>::MR, NR = TileOf<T>::NR;
  const int64_t lines = units_of<E>(run_length) * NR * static_cast<int64_t>(sizeof(E)) / 64;  // of a panel of B, a run
  Ahead ahead{reinterpret_cast<const char*>(next), next ? panels_of(lines, count) : 0};
  for (int64_t k = 0; k < units || k == 0; k += near_units)
    for (int64_t i = 0; i < count; ++i)
      multiply_panels(a + i * a_stride + k * MR, b + k * NR, std::min(near_units, units - k), tiles + i * MR * NR, add || k > 0, ahead);
}

// The product of `count` panels of A (no more than `most_panels`) and the panels [first, last) of B: finish(j, tiles) for each panel
// of B, with the tiles of A's panels one after another, (count MR, NR). Runs are added in double, and rounded once.
template <class T, class E, class Finish>
inline void multiply_group(const E* a, int64_t count, const E* b, int64_t first, int64_t last, int64_t K, Finish&& finish) {
  constexpr int64_t MR = TileOf<T>::MR, NR = TileOf<T>::NR;
  alignas(64) double sums[most_panels * MR * NR];
  alignas(64) T rounded[most_panels * MR * NR];
  const int64_t units = units_of<E>(K);
  for (int64_t j = first; j < last; ++j) {
    const E* panel = b + j * units * NR;
    multiply_panels_by_one<T>(a, count, units * MR, panel, units, sums, false, j + 1 < last ? panel + units * NR : nullptr);
    for (int64_t i = 0; i < count * MR * NR; ++i) rounded[i] = static_cast<T>(sums[i]);
    finish(j, rounded);
  }
}

}}}  // namespace
