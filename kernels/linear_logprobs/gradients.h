// The upstream gradients of a row, and values on their way into an output.
#pragma once

#include "tile.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

template <class T>
struct RowGradients {
  const LinearBackwardArgs& b;
  explicit RowGradients(const LinearBackwardArgs& b_) : b(b_) {}

  static double value(const void* p, int64_t i) { return p ? static_cast<double>(static_cast<const T*>(p)[i]) : 0.0; }
  double at_label(int64_t row, int64_t k) const { return value(b.grad_logprobs, row * b.forward.row.labels_per_row + k); }

  bool any(int64_t row) const {
    const LogprobsArgs& r = b.forward.row;
    if (value(b.grad_entropy, row) != 0 || value(b.grad_lse, row) != 0) return true;
    for (int64_t k = 0; k < r.labels_per_row; ++k)
      if (label_at(r, row, k) != r.ignore_index && at_label(row, k) != 0) return true;
    return false;
  }

  RowGradient of(int64_t row) const {
    const LogprobsArgs& r = b.forward.row;
    double total = 0;
    for (int64_t k = 0; k < r.labels_per_row; ++k)
      if (label_at(r, row, k) != r.ignore_index) total += at_label(row, k);
    return row_gradient(total, value(b.grad_entropy, row), value(b.grad_lse, row), value(r.entropies, row), value(r.log_sum, row), scale_of(r, row));
  }

  template <class Panel>
  PanelGradient<T> of_panel(const Panel& panel, int64_t lanes) const {
    PanelGradient<T> g{};
    g.rows = lanes;
    for (int64_t j = 0; j < lanes; ++j) {
      const RowGradient x = of(panel.row[j]);
      g.max[j] = static_cast<const T*>(b.forward.row.max)[panel.row[j]];
      g.constant[j] = static_cast<T>(x.constant);
      g.slope[j] = static_cast<T>(x.slope / log2e);
    }
    return g;
  }
};

// n values of `from` to an output of any float type, or added to it.
template <class T>
[[gnu::noinline]] void write_values(void* to, DType dtype, int64_t at, const T* from, int64_t n, bool add) {
  with_float_type(dtype, [&](auto s) {
    using S = decltype(s);
    S* p = static_cast<S*>(to) + at;
    if constexpr (sizeof(T) == 8 || sizeof(S) == 8) {
      for (int64_t i = 0; i < n; ++i) reinterpret_cast<double*>(p)[i] = static_cast<double>(from[i]) + (add ? reinterpret_cast<double*>(p)[i] : 0);
    } else {
      for (int64_t i = 0; i < n; ++i) p[i] = round_to<S, T>(add ? from[i] + to_compute(p[i]) : from[i]);
    }
  });
}

}}}  // namespace
