#include "cpu.h"

#include <algorithm>

#include "common/online_softmax.h"
#include "csrc/scratch.h"
#include "csrc/threads.h"
#include "row.h"

namespace fastrlhf { namespace FASTRLHF_ISA {
namespace {

// Labels stay in a kept set given as a mask, whatever the mask says of them.
template <class S, class T>
void keep_labels(const LogprobsArgs& a, int64_t row, const S* x, int64_t begin, int64_t n, T* buffer) {
  for (int64_t k = 0; k < a.labels_per_row; ++k) {
    const int64_t id = label_at(a, row, k), y = id - a.vocab_start - begin;
    if (id != a.ignore_index && y >= 0 && y < n) buffer[y] = soft_capped(to_compute(x[y]), a.softcap);
  }
}

template <class S, class T>
int64_t stage_block(const LogprobsArgs& a, int64_t row, const S* x, int64_t begin, int64_t n, T* buffer) {
  const int64_t size = stage(x + begin, n, a.softcap, a.kept_mask ? a.kept_mask + row * a.vocab + begin : nullptr, buffer);
  if (a.kept_mask) keep_labels(a, row, x + begin, begin, n, buffer);
  return size;
}

// One row's work space.
template <class T>
struct Space {
  int64_t most;  // columns of the largest CSR kept set
  Scratch<T> values, gradients, kept_values;
  Scratch<int64_t> columns;
  Space(const LogprobsArgs& a, int workers, bool backward)
      : most(a.kept_indptr ? most_kept(a) : 0), values(workers * block_size, Uninitialized{}),
        gradients(backward ? workers * block_size : 0, Uninitialized{}), kept_values(backward ? workers * most : 0, Uninitialized{}),
        columns(workers * most, Uninitialized{}) {}
};

template <bool Entropy, class S, class T>
RowStats<T> row_stats(const LogprobsArgs& a, int64_t row, const S* x, double scale, T* buffer, int64_t* columns) {
  using V = typename VectorOf<T>::type;
  if (!a.kept_indptr && !a.kept_mask && a.softcap == 0) return plain_row_stats<Entropy>(x, a.vocab, scale, buffer);
  RowStats<T> stats;
  const int64_t total = a.kept_indptr ? kept_columns(a, row, columns) : a.vocab;
  for (int64_t begin = 0; begin < total; begin += block_size) {
    int64_t size = std::min(block_size, total - begin);
    if (a.kept_indptr) {
      for (int64_t i = 0; i < size; ++i) buffer[i] = soft_capped(to_compute(x[columns[begin + i]]), a.softcap);
      for (; size % (2 * V::W); ++size) buffer[size] = static_cast<T>(-INFINITY);
    } else {
      size = stage_block(a, row, x, begin, size, buffer);
    }
    add_block<Entropy>(stats, buffer, size, scale);
  }
  stats.move(stats.max, scale);
  return stats;
}

template <class S>
void forward(const LogprobsArgs& a) {
  using T = typename ComputeOf<S>::type;
  const int workers = worthwhile(a.threads, a.rows * (a.kept_indptr ? 16 : a.vocab));
  Space<T> space(a, workers, false);
  const int64_t width = 3 + a.labels_per_row;
  Scratch<T> label_logits(workers * a.labels_per_row);
  parallel_for(a.rows, workers, [&](int64_t row, int worker) {
    if (ignored(a, row)) {
      if (a.partial) {
        for (int64_t i = 0; i < width; ++i) static_cast<T*>(a.partials)[row * width + i] = 0;
      } else {
        write_ignored_row<T>(a, row);
      }
      return;
    }
    const S* x = static_cast<const S*>(a.logits.data) + a.logits.offset(row);
    T* buffer = space.values.get() + worker * block_size;
    int64_t* columns = space.columns.get() + worker * space.most;
    const double scale = scale_of(a, row);
    const RowStats<T> stats = a.entropy ? row_stats<true, S, T>(a, row, x, scale, buffer, columns)
                                        : row_stats<false, S, T>(a, row, x, scale, buffer, columns);
    T* z = label_logits.get() + worker * a.labels_per_row;
    for (int64_t k = 0; k < a.labels_per_row; ++k) {
      const int64_t id = label_at(a, row, k), y = id - a.vocab_start;
      z[k] = id == a.ignore_index || y < 0 || y >= a.vocab ? static_cast<T>(-INFINITY)
                                                           : soft_capped(to_compute(x[y]), a.softcap);
    }
    if (a.partial) write_partials<T>(a, row, stats, z);
    else write_row_results<T>(a, row, scale, stats.max, stats.sum, stats.weighted, z);
  });
}

template <class T>
void combine(const LogprobsCombineArgs& c) {
  const LogprobsArgs& a = c.forward;
  const int64_t width = 3 + a.labels_per_row;
  Scratch<T> label_logits(a.labels_per_row);
  for (int64_t row = 0; row < a.rows; ++row) {
    if (ignored(a, row)) { write_ignored_row<T>(a, row); continue; }
    auto at = [&](int64_t rank, int64_t i) { return static_cast<const T*>(c.partials)[(rank * a.rows + row) * width + i]; };
    const double scale = scale_of(a, row);
    const RowStats<T> all = merged<T>(at, c.ranks, a.labels_per_row, scale, label_logits.get());
    write_row_results<T>(a, row, scale, all.max, all.sum, all.weighted, label_logits.get());
  }
}

// dx_i = p_i (g_lse - G - g_H (log p_i + H)) + sum over labels of g_k [i = y_k], G = sum of g_k; all over temperature,
// times 1 - tanh^2 under a soft cap. With u = (x_i - m) / T: p_i = e^u / s, log p_i = u - log s, so the first part is
// e^u (constant + slope u). `high`: the row's maximum m.
template <bool Entropy, bool Fused, class S, class T>
void gradient_block(const S* x, T* out, int64_t n, const Exponent<T>& e, double constant, double slope) {
  using V = typename VectorOf<T>::type;
  const V c = V::set(e.c), k = V::set(e.offset()), floor_ = V::set(-200);
  const V a = V::set(static_cast<T>(constant)), b = V::set(static_cast<T>(slope / log2e));
  for (int64_t i = 0; i < n; i += V::W) {
    const V t = Exponent<T>::template of<Fused>(load_as(x + i, static_cast<V*>(nullptr)), c, k);
    (exp2(t) * (Entropy ? fma(max(floor_, t), b, a) : a)).store(out + i);
  }
}

template <class S>
void backward(const LogprobsBackwardArgs& args) {
  using T = typename ComputeOf<S>::type;
  using V = typename VectorOf<T>::type;
  const LogprobsArgs& a = args.forward;
  const int workers = worthwhile(a.threads, a.rows * a.vocab);
  Space<T> space(a, workers, true);
  const int64_t K = a.labels_per_row;
  const bool past_cache = a.rows * a.vocab * static_cast<int64_t>(sizeof(S)) > (int64_t{16} << 20);
  auto value = [](const void* p, int64_t i) { return p ? static_cast<double>(static_cast<const T*>(p)[i]) : 0.0; };

  parallel_for(a.rows, workers, [&](int64_t row, int worker) {
    const S* x = static_cast<const S*>(a.logits.data) + a.logits.offset(row);
    S* out = static_cast<S*>(args.grad.data) + args.grad.offset(row);
    T* buffer = space.values.get() + worker * block_size;
    T* gradient = space.gradients.get() + worker * block_size;
    double total = 0;
    for (int64_t k = 0; k < K; ++k)
      if (label_at(a, row, k) != a.ignore_index) total += value(args.grad_logprobs, row * K + k);
    const double g_entropy = value(args.grad_entropy, row), g_lse = value(args.grad_lse, row);
    bool nothing = g_entropy == 0 && g_lse == 0;
    for (int64_t k = 0; k < K; ++k)
      nothing = nothing && (label_at(a, row, k) == a.ignore_index || value(args.grad_logprobs, row * K + k) == 0);
    if (nothing || ignored(a, row)) {
      std::memset(static_cast<void*>(out), 0, a.vocab * sizeof(S));
      return;
    }
    const double scale = scale_of(a, row);
    const RowGradient of_m = row_gradient(total, g_entropy, g_lse, value(a.entropies, row), value(a.log_sum, row), scale);
    const Exponent<T> exponent(static_cast<const T*>(a.max)[row], scale);
    // relative to the exponent's reference point instead of m
    const double shift = (exponent.reference - exponent.max) * scale, to_m = shift == shift ? std::exp(shift) : NAN;
    const double slope = of_m.slope * to_m, constant = (of_m.constant + of_m.slope * shift) * to_m;

    auto chain = [&](double z) {  // d softcap(x) / dx where softcap(x) = z
      return a.softcap == 0 ? 1 : soft_cap_slope(z, a.softcap, 1 / (a.softcap * a.softcap));
    };
    auto label_part = [&](int64_t column) {
      double g = 0;
      for (int64_t k = 0; k < K; ++k) {
        const int64_t y = label_at(a, row, k);
        if (y != a.ignore_index && y - a.vocab_start == column) g += value(args.grad_logprobs, row * K + k);
      }
      return g * scale;
    };
    auto block_gradient = [&](const auto* p, int64_t n) {
      if (!exponent.fused) gradient_block<true, false>(p, gradient, n, exponent, constant, slope);
      else if (g_entropy != 0) gradient_block<true, true>(p, gradient, n, exponent, constant, slope);
      else gradient_block<false, true>(p, gradient, n, exponent, constant, slope);
    };

    if (a.kept_indptr) {  // only the kept columns have a gradient; they are read before the row is cleared
      int64_t* columns = space.columns.get() + worker * space.most;
      const int64_t n = kept_columns(a, row, columns);
      T* values = space.kept_values.get() + worker * space.most;
      for (int64_t i = 0; i < n; ++i) values[i] = soft_capped(to_compute(x[columns[i]]), a.softcap);
      std::memset(static_cast<void*>(out), 0, a.vocab * sizeof(S));
      for (int64_t begin = 0; begin < n; begin += block_size) {
        const int64_t size = std::min(block_size, n - begin);
        for (int64_t i = 0; i < size; ++i) buffer[i] = values[begin + i];
        int64_t padded = size;
        for (; padded % V::W; ++padded) buffer[padded] = static_cast<T>(-INFINITY);
        block_gradient(buffer, padded);
        for (int64_t i = 0; i < size; ++i) {
          const int64_t column = columns[begin + i];
          out[column] = round_to<S, T>(static_cast<T>((gradient[i] + label_part(column)) * chain(buffer[i])));
        }
      }
      return;
    }
    for (int64_t begin = 0; begin < a.vocab; begin += block_size) {
      const int64_t n = std::min(block_size, a.vocab - begin);
      if (n == block_size && a.softcap == 0 && !a.kept_mask) {
        block_gradient(x + begin, n);
      } else {
        block_gradient(buffer, stage_block(a, row, x, begin, n, buffer));
      }
      for (int64_t k = 0; k < K; ++k) {
        const int64_t id = label_at(a, row, k), y = id - a.vocab_start - begin;
        if (id != a.ignore_index && y >= 0 && y < n)
          gradient[y] += static_cast<T>(value(args.grad_logprobs, row * K + k) * scale);
      }
      if (a.softcap != 0) {
        const V cap = V::set(static_cast<T>(a.softcap)), square = V::set(static_cast<T>(1 / (a.softcap * a.softcap)));
        for (int64_t i = 0; i < n; i += V::W) {
          const V g = V::load(gradient + i);  // 0 outside the kept set, where the logit is -inf
          select(g != V::set(0), g * soft_cap_slope(V::load(buffer + i), cap, square), g).store(gradient + i);
        }
      }
      write_row<S, T>(out + begin, gradient, n, past_cache);
    }
    if (past_cache) stream_end();
  });
}

}  // namespace

void logprobs_forward(const LogprobsArgs& a) {
  with_row_type(a.logits.dtype, [&](auto s) { forward<decltype(s)>(a); });
}

void logprobs_backward(const LogprobsBackwardArgs& a) {
  with_row_type(a.forward.logits.dtype, [&](auto s) { backward<decltype(s)>(a); });
}

#if FASTRLHF_ISA_LEVEL < 3
void logprobs_combine(const LogprobsCombineArgs& c) {
  with_compute_type(is_f64(c), [&](auto t) { combine<decltype(t)>(c); });
}
#endif

}}  // namespace
