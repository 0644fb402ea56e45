// Kept sets given column by column: a row's logits are as many dot products as it keeps columns, and the gradients touch no
// other column.
#pragma once

#include "csrc/scratch.h"
#include "csrc/threads.h"
#include "gradients.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

// A row of a matrix as T.
template <class T>
[[gnu::noinline]] void load_row(const Matrix& m, int64_t row, int64_t n, T* out) {
  with_type_of<T>(m.dtype, [&](auto s) {
    const auto* p = static_cast<const decltype(s)*>(m.data) + m.offset(row);
    for (int64_t i = 0; i < n; ++i) out[i] = to_compute(p[i]);
  });
}

template <class T>
inline T dot(const T* a, const T* b, int64_t n) {
  using V = typename VectorOf<T>::type;
  V s0 = V::set(0), s1 = s0;
  int64_t i = 0;
  for (; i + 2 * V::W <= n; i += 2 * V::W) {
    s0 = fma(V::load(a + i), V::load(b + i), s0);
    s1 = fma(V::load(a + i + V::W), V::load(b + i + V::W), s1);
  }
  T rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum(s0 + s1) + rest;
}

// sum += factor * x
template <class T>
inline void add_scaled(T factor, const T* x, int64_t n, T* sum) {
  using V = typename VectorOf<T>::type;
  const V f = V::set(factor);
  int64_t i = 0;
  for (; i + V::W <= n; i += V::W) fma(f, V::load(x + i), V::load(sum + i)).store(sum + i);
  for (; i < n; ++i) sum[i] += factor * x[i];
}

// The kept columns of the rows [0, count) of `rows`, row after row, and their logits.
template <class T>
struct Entries {
  Scratch<int64_t> begin, size, columns;  // of row i: columns[begin[i]] and on, size[i] of them
  Scratch<T> logits;

  Entries(const LinearArgs& a, const int64_t* rows, int64_t count) : Entries(a, rows, count, total(a, rows, count)) {}

  int64_t end(int64_t i) const { return begin[i] + size[i]; }

 private:
  static int64_t room(const LogprobsArgs& r, int64_t row) { return r.kept_indptr[row + 1] - r.kept_indptr[row] + r.labels_per_row; }
  static int64_t total(const LinearArgs& a, const int64_t* rows, int64_t count) {
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) n += room(a.row, rows[i]);
    return n;
  }

  [[gnu::noinline]] Entries(const LinearArgs& a, const int64_t* rows, int64_t count, int64_t total)
      : begin(count, Uninitialized{}), size(count, Uninitialized{}), columns(total, Uninitialized{}), logits(total, Uninitialized{}) {
    int64_t at = 0;
    for (int64_t i = 0; i < count; ++i) {
      begin[i] = at;
      at += room(a.row, rows[i]);
    }
    Scratch<T> work(a.row.threads * 2 * a.width, Uninitialized{});
    parallel_for(count, a.row.threads, [&](int64_t i, int worker) {
      T *hidden = work.get() + worker * 2 * a.width, *weight = hidden + a.width;
      size[i] = kept_columns(a.row, rows[i], columns.get() + begin[i]);
      load_row(a.hidden, rows[i], a.width, hidden);
      for (int64_t j = begin[i]; j < end(i); ++j) {
        load_row(a.weight, columns[j], a.width, weight);
        const T x = dot(hidden, weight, a.width);
        logits[j] = soft_capped(a.bias ? x + bias_at<T>(a, columns[j]) : x, a.row.softcap);
      }
    });
  }
};

template <class T>
inline void sparse_forward(const LinearArgs& a, const int64_t* rows, int64_t count) {
  const LogprobsArgs& r = a.row;
  const Entries<T> entries(a, rows, count);
  Scratch<T> label_logits(r.labels_per_row), buffer(block_size, Uninitialized{});
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows[i];
    const double scale = scale_of(r, row);
    RowStats<T> stats;
    for (int64_t j = entries.begin[i]; j < entries.end(i); j += block_size) {
      const int64_t size = stage(entries.logits.get() + j, std::min(block_size, entries.end(i) - j), 0, nullptr, buffer.get());
      add_block<true>(stats, buffer.get(), size, scale);
    }
    stats.move(stats.max, scale);
    for (int64_t k = 0; k < r.labels_per_row; ++k) {
      const int64_t *first = entries.columns.get() + entries.begin[i], *last = entries.columns.get() + entries.end(i);
      const int64_t y = label_at(r, row, k), *at = std::lower_bound(first, last, y - r.vocab_start);
      const bool here = y != r.ignore_index && at != last && *at == y - r.vocab_start;
      label_logits[k] = here ? entries.logits[at - entries.columns.get()] : static_cast<T>(-INFINITY);
    }
    if (r.partial) write_partials<T>(r, row, stats, label_logits.get());
    else write_row_results<T>(r, row, scale, stats.max, stats.sum, stats.weighted, label_logits.get());
  }
}

template <class T>
inline void sparse_backward(const LinearBackwardArgs& b, const int64_t* rows, int64_t count, const RowGradients<T>& gradients) {
  const LinearArgs& a = b.forward;
  const LogprobsArgs& r = a.row;
  const int64_t H = a.width;
  const Entries<T> entries(a, rows, count);
  Scratch<T> work(r.threads * 2 * H, Uninitialized{});
  parallel_for(count, r.threads, [&](int64_t i, int worker) {  // logits become their gradients; grad_hidden
    T *weight = work.get() + worker * 2 * H, *sum = weight + H;
    const int64_t row = rows[i];
    const RowGradient g = gradients.of(row);
    const double scale = scale_of(r, row), high = static_cast<const T*>(r.max)[row];
    std::fill(sum, sum + H, T(0));
    for (int64_t j = entries.begin[i]; j < entries.end(i); ++j) {
      const double z = entries.logits[j], u = (z - high) * scale, e = std::exp(u);
      double d = e == 0 ? 0 : e * (g.constant + g.slope * u);
      for (int64_t k = 0; k < r.labels_per_row; ++k) {
        const int64_t y = label_at(r, row, k);
        if (y != r.ignore_index && y - r.vocab_start == entries.columns[j]) d += gradients.at_label(row, k) * scale;
      }
      if (r.softcap != 0 && d != 0) d *= soft_cap_slope(z, r.softcap, 1 / (r.softcap * r.softcap));
      entries.logits[j] = static_cast<T>(d);
      if (!b.grad_hidden) continue;
      load_row(a.weight, entries.columns[j], H, weight);
      add_scaled(static_cast<T>(d), weight, H, sum);
    }
    if (b.grad_hidden) write_values(b.grad_hidden, a.hidden.dtype, row * H, sum, H, false);
  });
  if (!b.grad_weight && !b.grad_bias) return;

  // entries by column, those of a column in the order of the rows
  Scratch<int64_t> start(r.vocab + 1);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = entries.begin[i]; j < entries.end(i); ++j) ++start[entries.columns[j] + 1];
  for (int64_t c = 0; c < r.vocab; ++c) start[c + 1] += start[c];
  const int64_t total = start[r.vocab];
  Scratch<int64_t> entry(total, Uninitialized{}), row_of(total, Uninitialized{}), at(r.vocab, Uninitialized{});
  std::copy(start.get(), start.get() + r.vocab, at.get());
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = entries.begin[i]; j < entries.end(i); ++j) {
      const int64_t p = at[entries.columns[j]]++;
      entry[p] = j;
      row_of[p] = rows[i];
    }
  parallel_for(r.vocab, r.threads, [&](int64_t c, int worker) {
    if (start[c] == start[c + 1]) return;
    T *hidden = work.get() + worker * 2 * H, *sum = hidden + H;
    std::fill(sum, sum + H, T(0));
    double total_ = 0;
    for (int64_t p = start[c]; p < start[c + 1]; ++p) {
      const T d = entries.logits[entry[p]];
      total_ += d;
      if (!b.grad_weight) continue;
      load_row(a.hidden, row_of[p], H, hidden);
      add_scaled(d, hidden, H, sum);
    }
    if (b.grad_weight) write_values(b.grad_weight, b.grad_weight_dtype, c * H, sum, H, b.accumulate);
    if (b.grad_bias) {
      T& out = static_cast<T*>(b.grad_bias)[c];
      out = static_cast<T>(b.accumulate ? out + total_ : total_);
    }
  });
}

}}}  // namespace
