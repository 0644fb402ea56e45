// One row of the logprobs op, whatever its logits come from: its labels, its kept columns, its results.
#pragma once

#include <algorithm>

#include "args.h"
#include "common/online_softmax.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

inline int64_t label_at(const LogprobsArgs& a, int64_t row, int64_t k) {
  const int64_t i = row * a.labels_per_row + k;
  return a.label_dtype == DType::i32 ? static_cast<const int32_t*>(a.labels)[i] : static_cast<const int64_t*>(a.labels)[i];
}

inline bool ignored(const LogprobsArgs& a, int64_t row) {
  for (int64_t k = 0; k < a.labels_per_row; ++k)
    if (label_at(a, row, k) != a.ignore_index) return false;
  return true;
}

inline double scale_of(const LogprobsArgs& a, int64_t row) { return 1 / (a.temperatures ? a.temperatures[row] : a.temperature); }

// The columns of a row that a CSR kept set names, and its labels, once each, in rising order.
inline int64_t kept_columns(const LogprobsArgs& a, int64_t row, int64_t* columns) {
  int64_t n = 0;
  auto add = [&](int64_t id) {
    id -= a.vocab_start;
    if (id < 0 || id >= a.vocab) return;
    int64_t at = n;  // sets arrive sorted: the search ends at once
    while (at > 0 && columns[at - 1] > id) --at;
    if (at > 0 && columns[at - 1] == id) return;
    for (int64_t i = n; i > at; --i) columns[i] = columns[i - 1];
    columns[at] = id;
    ++n;
  };
  for (int64_t i = a.kept_indptr[row]; i < a.kept_indptr[row + 1]; ++i) add(a.kept_indices[i]);
  for (int64_t k = 0; k < a.labels_per_row; ++k) {
    const int64_t y = label_at(a, row, k);
    if (y != a.ignore_index) add(y);
  }
  return n;
}

inline int64_t most_kept(const LogprobsArgs& a) {
  int64_t most = 0;
  if (a.kept_indptr)
    for (int64_t r = 0; r < a.rows; ++r) most = std::max(most, a.kept_indptr[r + 1] - a.kept_indptr[r]);
  return most + a.labels_per_row;
}

// The statistics of `count` parts of a row's columns, in their order: at(part, 0 .. 2) their max, sum and weighted sum,
// at(part, 3 + k) their label logits; z: the label logits, -inf where no part holds one.
template <class T, class At>
inline RowStats<T> merged(At&& at, int64_t count, int64_t labels, double scale, T* z) {
  RowStats<T> all;
  for (int64_t k = 0; k < labels; ++k) z[k] = static_cast<T>(-INFINITY);
  for (int64_t i = 0; i < count; ++i) {
    RowStats<T> one;
    one.max = static_cast<T>(at(i, 0)), one.sum = at(i, 1), one.weighted = at(i, 2);
    one.reference = one.max;
    if (one.max > all.max) {
      all.max = one.max;
      all.move(one.max, scale);
    } else {
      one.move(all.reference, scale);
    }
    all.sum += one.sum;
    all.weighted += one.weighted;
    for (int64_t k = 0; k < labels; ++k)
      if (const T x = static_cast<T>(at(i, 3 + k)); !(x <= z[k])) z[k] = x;
  }
  return all;
}

// What a row's statistics say of its labels; z: the (soft-capped) label logits, -inf where another rank holds them.
// Inlined, which takes 10 ns from a short row's 55.
template <class T>
[[gnu::always_inline]] inline void write_row_results(const LogprobsArgs& a, int64_t row, double scale, T max_, double sum_, double weighted, const T* z) {
  const double log_sum = log_of_sum(sum_);
  for (int64_t k = 0; k < a.labels_per_row; ++k)
    static_cast<T*>(a.logprobs)[row * a.labels_per_row + k] = label_at(a, row, k) == a.ignore_index
        ? T(0) : static_cast<T>(logprob_of(z[k], max_, scale, log_sum));
  if (a.entropies) static_cast<T*>(a.entropies)[row] = static_cast<T>(entropy_of(log_sum, weighted, sum_));
  if (a.lse) static_cast<T*>(a.lse)[row] = static_cast<T>(max_ * scale + log_sum);
  if (a.max) static_cast<T*>(a.max)[row] = max_;
  if (a.log_sum) static_cast<T*>(a.log_sum)[row] = static_cast<T>(log_sum);
}

template <class T>
inline void write_ignored_row(const LogprobsArgs& a, int64_t row) {
  for (int64_t k = 0; k < a.labels_per_row; ++k) static_cast<T*>(a.logprobs)[row * a.labels_per_row + k] = 0;
  for (void* p : {a.entropies, a.lse, a.max, a.log_sum})
    if (p) static_cast<T*>(p)[row] = 0;
}

// A rank's share of them, for `merged`.
template <class T>
inline void write_partials(const LogprobsArgs& a, int64_t row, const RowStats<T>& s, const T* z) {
  T* out = static_cast<T*>(a.partials) + row * (3 + a.labels_per_row);
  out[0] = s.max;
  out[1] = static_cast<T>(s.sum);
  out[2] = static_cast<T>(s.weighted);
  for (int64_t k = 0; k < a.labels_per_row; ++k) out[3 + k] = z[k];
}

}}}  // namespace
