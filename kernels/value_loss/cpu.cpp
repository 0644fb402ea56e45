#include "cpu.h"

#include "common/reduction.h"
#include "common/tokens.h"
#include "math.h"

namespace fastrlhf { namespace FASTRLHF_ISA {
namespace {

template <class T>
struct Chunk { Buffer<T> values, old, returns, mask, residual, grad; };

struct Sums {
  double loss = 0, clipped = 0;
  Moments residual, returns, values;
};

template <class T>
void chunk_loss(const ValueArgs& a, double weight, int64_t b, int64_t t, int64_t n, T* grad, Chunk<T>& c, Sums& sums) {
  using V = typename VectorOf<T>::type;
  const T* values = fetch<T>(a.values, a.rows, b, t, n, c.values);
  const T* old = a.old_values ? fetch<T>(a.old_values, a.rows, b, t, n, c.old) : values;
  const T* returns = fetch<T>(a.returns, a.rows, b, t, n, c.returns);
  const T* mask = fetch_mask<T>(a.mask, a.rows, b, t, n, c.mask);
  const V zero = V::set(0), bound = V::set(static_cast<T>(a.clip)), w = V::set(static_cast<T>(weight));
  V loss = zero, clipped = zero;
  for (int64_t i = 0; i < n; i += V::W) {
    const V m = V::load(mask + i), v = V::load(values + i), r = V::load(returns + i);
    const auto counted = m != zero;
    V square, slope, held;
    value_error(v, V::load(old + i), r, bound, square, slope, held);
    loss = loss + select(counted, m * square, zero);
    clipped = clipped + select(counted, m * held, zero);
    if (grad) select(counted, m * w * slope, zero).store(grad + i);
    (r - v).store(c.residual.data + i);
  }
  sums.loss += 0.5 * weight * sum(loss);
  sums.clipped += sum(clipped);
  sums.residual.merge(chunk_moments(c.residual.data, mask, n));
  sums.returns.merge(chunk_moments(returns, mask, n));
  sums.values.merge(chunk_moments(values, mask, n));
}

template <class T>
void value_loss_as(const ValueArgs& a) {
  const Rows& rows = a.rows;
  const Units units(rows);
  const int workers = worthwhile(a.threads, rows.total());
  Scratch<Chunk<T>> chunks(workers, Uninitialized{});
  Scratch<double> counts(units.size()), row_counts(rows.count), weights(rows.count);
  Scratch<Sums> sums(units.size());
  parallel_for(units.size(), workers, [&](int64_t u, int worker) {
    using V = typename VectorOf<T>::type;
    const Unit unit = units[u];
    if (!a.mask) { counts[u] = static_cast<double>(unit.size); return; }
    for (int64_t t = unit.begin, end = unit.begin + unit.size; t < end; t += chunk_size) {
      const int64_t n = end - t < chunk_size ? end - t : chunk_size;
      const T* mask = fetch<T>(a.mask, rows, unit.row, t, n, chunks[worker].mask);
      V count = V::set(0);
      for (int64_t i = 0; i < n; i += V::W) count = count + V::load(mask + i);
      counts[u] += sum(count);
    }
  });
  Totals totals;
  for (int64_t u = 0; u < units.size(); ++u) row_counts[units[u].row] += counts[u];
  for (int64_t b = 0; b < rows.count; ++b) totals.tokens += row_counts[b], totals.sequences += row_counts[b] != 0;
  const double share = share_of(a.reduction, a.denominator, totals, rows.length);
  for (int64_t b = 0; b < rows.count; ++b) weights[b] = share * row_factor(a.reduction, row_counts[b]);
  parallel_for(units.size(), workers, [&](int64_t u, int worker) {
    const Unit unit = units[u];
    Chunk<T>& c = chunks[worker];
    for (int64_t t = unit.begin, end = unit.begin + unit.size; t < end; t += chunk_size) {
      const int64_t n = end - t < chunk_size ? end - t : chunk_size;
      T* to = a.grad_values ? static_cast<T*>(a.grad_values) + rows.start(unit.row) + t : nullptr;
      T* grad = to ? output(to, n, c.grad) : nullptr;
      chunk_loss(a, weights[unit.row], unit.row, t, n, grad, c, sums[u]);
      if (to) finish_output(to, grad, n);
    }
  });
  Sums all;
  for (int64_t u = 0; u < units.size(); ++u) {
    all.loss += sums[u].loss, all.clipped += sums[u].clipped;
    all.residual.merge(sums[u].residual), all.returns.merge(sums[u].returns), all.values.merge(sums[u].values);
  }
  const bool any = totals.tokens != 0;
  a.result[0] = all.loss;
  a.result[1] = any ? all.clipped / totals.tokens : 0;
  a.result[2] = all.returns.m2 > 0 ? 1 - all.residual.m2 / all.returns.m2 : 0;
  a.result[3] = all.values.mean;
  a.result[4] = all.returns.mean;
  a.result[5] = totals.tokens;
}

}  // namespace

void value_loss(const ValueArgs& a) { with_compute_type(a.f64, [&](auto t) { value_loss_as<decltype(t)>(a); }); }

}}  // namespace
