// Tiles of logits, some columns of the vocabulary by NR rows of the call (so that a vector holds rows, and nothing is ever summed
// across lanes): finished into logits, folded into the rows' statistics, or turned into its gradient.
#pragma once

#include "args.h"
#include "common/gemm.h"
#include "logprobs/row.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

// What the tiles of a panel of NR rows need of them. Rows that are missing have id -1.
template <class T>
struct RowPanel {
  static constexpr int64_t NR = TileOf<T>::NR;
  int64_t row[NR];
  alignas(64) T scale[NR];  // log2(e) / T: exponents are of base 2
};

template <class T>
inline T bias_at(const LinearArgs& a, int64_t column) {
  T b = 0;
  with_float_type(a.bias_dtype, [&](auto s) { b = static_cast<T>(to_compute(static_cast<const decltype(s)*>(a.bias)[column])); });
  return b;
}

// From products to logits: bias and soft cap; then z(row, k, logit) for each label in the tile; then -inf outside the kept set.
template <class T, class Label>
inline void finish_logits(const LinearArgs& a, const RowPanel<T>& panel, int64_t column, int64_t columns, T* tile, Label&& z) {
  using V = typename VectorOf<T>::type;
  constexpr int64_t NR = TileOf<T>::NR;
  const LogprobsArgs& r = a.row;
  if (a.bias)
    for (int64_t i = 0; i < columns; ++i) {
      const V b = V::set(bias_at<T>(a, column + i));
      for (int64_t j = 0; j < NR; j += V::W) (V::load(tile + i * NR + j) + b).store(tile + i * NR + j);
    }
  if (r.softcap != 0) {
    const V cap = V::set(static_cast<T>(r.softcap)), inverse = V::set(static_cast<T>(1 / r.softcap));
    for (int64_t i = 0; i < columns * NR; i += V::W) (cap * tanh(V::load(tile + i) * inverse)).store(tile + i);
  }
  for (int64_t j = 0; j < NR; ++j) {
    if (panel.row[j] < 0) continue;
    for (int64_t k = 0; k < r.labels_per_row; ++k) {
      const int64_t y = label_at(r, panel.row[j], k), i = y - r.vocab_start - column;
      if (i >= 0 && i < columns && y != r.ignore_index) z(j, k, tile[i * NR + j]);
    }
    if (!r.kept_mask) continue;
    const uint8_t* kept = r.kept_mask + panel.row[j] * r.vocab + column;
    for (int64_t i = 0; i < columns; ++i) {
      if (kept[i]) continue;
      bool label = false;
      for (int64_t k = 0; k < r.labels_per_row; ++k) label |= label_at(r, panel.row[j], k) - r.vocab_start == column + i;
      if (!label) tile[i * NR + j] = static_cast<T>(-INFINITY);
    }
  }
}

// Statistics of the rows of a panel over some columns: arrays of lanes; `weighted` in units of the exponent of base 2.
template <class T>
struct Lanes {
  T* max;
  double *sum, *weighted;
};

template <class T>
inline void fold(const RowPanel<T>& panel, int64_t columns, const T* tile, const Lanes<T>& lanes) {
  using V = typename VectorOf<T>::type;
  constexpr int64_t NR = TileOf<T>::NR;
  const V zero = V::set(0), low = V::set(static_cast<T>(-INFINITY)), floor_ = V::set(-200);  // 0 * u, never 0 * -inf
  for (int64_t j = 0; j < NR; j += V::W) {
    const V old = V::load(lanes.max + j), c = V::load(panel.scale + j);
    V high = old;
    for (int64_t i = 0; i < columns; ++i) high = max(V::load(tile + i * NR + j), high);
    const V reference = select(high > low, high, zero);
    alignas(64) double sum[V::W] = {}, weighted[V::W] = {};
    for (int64_t begin = 0; begin < columns; begin += TileOf<T>::MR) {
      V s = zero, t = zero;
      for (int64_t i = begin; i < std::min(columns, begin + TileOf<T>::MR); ++i) {
        const V u = (V::load(tile + i * NR + j) - reference) * c, e = exp2(u);
        s = s + e;
        t = fma(e, max(floor_, u), t);
      }
      accumulate(sum, s);
      accumulate(weighted, t);
    }
    alignas(64) T shift[V::W], factor[V::W];
    const V moved = (old - reference) * c;
    max(floor_, moved).store(shift);
    exp2(moved).store(factor);
    high.store(lanes.max + j);
    double *all = lanes.sum + j, *all_weighted = lanes.weighted + j;
    for (int64_t i = 0; i < V::W; ++i) {
      const double before = (all_weighted[i] + all[i] * shift[i]) * factor[i];
      all_weighted[i] = (factor[i] > 0 ? before : 0.0) + weighted[i];
      all[i] = all[i] * factor[i] + sum[i];
    }
  }
}

// The gradient of a panel's rows: dx = 2^u (constant + slope u), u = (x - max) scale; rows that have none: all 0.
template <class T>
struct PanelGradient {
  static constexpr int64_t NR = TileOf<T>::NR;
  alignas(64) T max[NR], constant[NR], slope[NR];
  int64_t rows;  // that are there; the lanes after them get 0
};

// tile: finished logits, which become their gradient with respect to the products.
template <class T, class LabelGradient>
inline void gradient(const LinearArgs& a, const RowPanel<T>& panel, const PanelGradient<T>& g, int64_t column, int64_t columns, T* tile,
                     LabelGradient&& at_label) {
  using V = typename VectorOf<T>::type;
  constexpr int64_t NR = TileOf<T>::NR;
  const LogprobsArgs& r = a.row;
  T derivative[most_panels * TileOf<T>::MR * NR];
  const V floor_ = V::set(-200);
  if (r.softcap != 0) {
    const V cap = V::set(static_cast<T>(r.softcap)), square = V::set(static_cast<T>(1 / (r.softcap * r.softcap)));
    for (int64_t i = 0; i < columns * NR; i += V::W) soft_cap_slope(V::load(tile + i), cap, square).store(derivative + i);
  }
  for (int64_t j = 0; j < NR; j += V::W) {
    const V m = V::load(g.max + j), c = V::load(panel.scale + j), p = V::load(g.constant + j), q = V::load(g.slope + j);
    for (int64_t i = 0; i < columns; ++i) {
      T* x = tile + i * NR + j;
      const V u = (V::load(x) - m) * c;
      (exp2(u) * fma(max(floor_, u), q, p)).store(x);
    }
  }
  for (int64_t j = 0; j < g.rows; ++j)
    for (int64_t k = 0; k < r.labels_per_row; ++k) {
      const int64_t y = label_at(r, panel.row[j], k), i = y - r.vocab_start - column;
      if (i >= 0 && i < columns && y != r.ignore_index) tile[i * NR + j] += at_label(panel.row[j], k);
    }
  if (r.softcap != 0) {
    const V zero = V::set(0);
    for (int64_t i = 0; i < columns * NR; i += V::W) {
      const V x = V::load(tile + i);
      select(x != zero, x * V::load(derivative + i), x).store(tile + i);  // outside the kept set the logit is -inf, the gradient 0
    }
  }
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t j = g.rows; j < NR; ++j) tile[i * NR + j] = 0;
}

}}}  // namespace
