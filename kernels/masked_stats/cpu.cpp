#include "cpu.h"

#include "common/tokens.h"

namespace fastrlhf { namespace FASTRLHF_ISA {
namespace {

template <class T>
struct Chunk { Buffer<T> x, mask, out; };

// body(unit index, begin of chunk, tokens of it, chunk buffers) over all units.
template <class T, class Body>
void for_each_chunk(const Rows& rows, int threads, const Units& units, Body&& body) {
  const int workers = worthwhile(threads, rows.total());
  Scratch<Chunk<T>> chunks(workers, Uninitialized{});
  parallel_for(units.size(), workers, [&](int64_t u, int worker) {
    const Unit unit = units[u];
    for (int64_t t = unit.begin, end = unit.begin + unit.size; t < end; t += chunk_size)
      body(u, unit.row, t, end - t < chunk_size ? end - t : chunk_size, chunks[worker]);
  });
}

template <class T>
void moments_as(const MomentsArgs& a) {
  const Units units(a.rows);
  Scratch<Moments> partial(units.size());
  for_each_chunk<T>(a.rows, a.threads, units, [&](int64_t u, int64_t b, int64_t t, int64_t n, Chunk<T>& c) {
    const T* mask = fetch_mask<T>(a.mask, a.rows, b, t, n, c.mask);
    partial[u].merge(chunk_moments(fetch<T>(a.x, a.rows, b, t, n, c.x), mask, n));
  });
  Moments all;
  for (int64_t u = 0; u < units.size(); ++u) all.merge(partial[u]);
  a.moments[0] = all.n, a.moments[1] = all.mean, a.moments[2] = all.m2;
}

template <class T>
void row_sums_as(const RowSumsArgs& a) {
  using V = typename VectorOf<T>::type;
  const Units units(a.rows);
  struct Sum { double total, count; };
  Scratch<Sum> partial(units.size());
  for_each_chunk<T>(a.rows, a.threads, units, [&](int64_t u, int64_t b, int64_t t, int64_t n, Chunk<T>& c) {
    const T* mask = fetch_mask<T>(a.mask, a.rows, b, t, n, c.mask);
    const T* x = fetch<T>(a.x, a.rows, b, t, n, c.x);
    const V zero = V::set(0);
    V total = zero, count = zero;
    for (int64_t i = 0; i < n; i += V::W) {
      const V m = V::load(mask + i);
      total = total + select(m != zero, m * V::load(x + i), zero);
      count = count + m;
    }
    partial[u].total += sum(total);
    partial[u].count += sum(count);
  });
  int64_t u = 0;
  for (int64_t b = 0; b < a.rows.count; ++b) {
    double total = 0, count = 0;
    for (; u < units.size() && units[u].row == b; ++u) {
      total += partial[u].total;
      count += partial[u].count;
    }
    static_cast<T*>(a.sums)[b] = static_cast<T>(a.average ? (count != 0 ? total / count : 0) : total);
    if (a.counts) static_cast<T*>(a.counts)[b] = static_cast<T>(count);
  }
}

template <class T>
void standardize_as(const StandardizeArgs& a) {
  const Units units(a.rows);
  for_each_chunk<T>(a.rows, a.threads, units, [&](int64_t, int64_t b, int64_t t, int64_t n, Chunk<T>& c) {
    const T* mask = fetch_mask<T>(a.mask, a.rows, b, t, n, c.mask);
    standardize_chunk(fetch<T>(a.x, a.rows, b, t, n, c.x), mask, static_cast<T*>(a.out) + a.rows.start(b) + t, n, a.shift,
                      a.scale, a.back, c.out);
  });
}

}  // namespace

void masked_moments(const MomentsArgs& a) { with_compute_type(a.f64, [&](auto t) { moments_as<decltype(t)>(a); }); }
void row_sums(const RowSumsArgs& a) { with_compute_type(a.f64, [&](auto t) { row_sums_as<decltype(t)>(a); }); }
void standardize(const StandardizeArgs& a) { with_compute_type(a.f64, [&](auto t) { standardize_as<decltype(t)>(a); }); }

}}  // namespace
