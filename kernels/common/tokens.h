// The token-level ops' way over their inputs: chunks of a row, whatever the dtype and the strides, as float or double.
#pragma once

#include "convert.h"
#include "csrc/scratch.h"
#include "csrc/threads.h"
#include "moments.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int64_t chunk_size = 512;   // tokens held in cache at once; a multiple of every vector width
constexpr int64_t unit_size = 4096;   // tokens of one partial sum: fixed, so that no result depends on the threads

template <class T>
struct alignas(64) Buffer {
  T data[chunk_size];
};

template <class T, class S>
inline void convert_run(T* to, const S* from, int64_t n, int64_t stride) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(from[i * stride]);
  }
}

// Tokens [t, t + n) of row b as T, zeros up to the next whole vector; in place where they already are that.
template <class T>
inline const T* fetch(const Array& a, const Rows& rows, int64_t b, int64_t t, int64_t n, Buffer<T>& buffer) {
  using V = typename VectorOf<T>::type;
  const int64_t at = rows.offset(a, b, t), stride = a.per_row ? 0 : a.col_stride;
  constexpr DType own = sizeof(T) == 8 ? DType::f64 : DType::f32;
  T* to = buffer.data;
  if (a.dtype == own && stride == 1 && n % V::W == 0) return static_cast<const T*>(a.data) + at;
  switch (a.dtype) {
    case DType::f32: convert_run(to, static_cast<const float*>(a.data) + at, n, stride); break;
    case DType::f64: convert_run(to, static_cast<const double*>(a.data) + at, n, stride); break;
    case DType::u8: convert_run(to, static_cast<const uint8_t*>(a.data) + at, n, stride); break;
    case DType::i32: convert_run(to, static_cast<const int32_t*>(a.data) + at, n, stride); break;
    case DType::i64: convert_run(to, static_cast<const int64_t*>(a.data) + at, n, stride); break;
    case DType::bf16: {
      const uint16_t* from = static_cast<const uint16_t*>(a.data) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(from[i * stride]);
      break;
    }
    case DType::f16: {
      const uint16_t* from = static_cast<const uint16_t*>(a.data) + at;
      for (int64_t i = 0; i < n; ++i) to[i] = half_to_float(from[i * stride]);
      break;
    }
  }
  for (int64_t i = n; i % V::W; ++i) to[i] = T(0);
  return to;
}

// The mask of a chunk as weights; ones where there is no mask, zeros past n.
template <class T>
inline const T* fetch_mask(const Array& mask, const Rows& rows, int64_t b, int64_t t, int64_t n, Buffer<T>& buffer) {
  if (mask) return fetch<T>(mask, rows, b, t, n, buffer);
  using V = typename VectorOf<T>::type;
  int64_t i = 0;
  for (; i < n; ++i) buffer.data[i] = T(1);
  for (; i % V::W; ++i) buffer.data[i] = T(0);
  return buffer.data;
}

// Where to compute n outputs: straight into the tensor, or beside it when the last vector would pass its end.
template <class T>
inline T* output(T* to, int64_t n, Buffer<T>& buffer) {
  return n % VectorOf<T>::type::W ? buffer.data : to;
}
template <class T>
inline void finish_output(T* to, const T* from, int64_t n) {
  if (to != from) for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// The rows cut into units of unit_size tokens: unit u belongs to row `row` and starts at token `begin`.
struct Unit { int64_t row, begin, size; };

class Units {
 public:
  explicit Units(const Rows& rows) : count_(count(rows)), units_(count_) {
    int64_t u = 0;
    for (int64_t b = 0; b < rows.count; ++b)
      for (int64_t t = 0, n = rows.size(b); t < n; t += unit_size)
        units_[u++] = {b, t, n - t < unit_size ? n - t : unit_size};
  }
  int64_t size() const { return count_; }
  const Unit& operator[](int64_t u) const { return units_[u]; }

 private:
  static int64_t count(const Rows& rows) {
    int64_t n = 0;
    for (int64_t b = 0; b < rows.count; ++b) n += (rows.size(b) + unit_size - 1) / unit_size;
    return n;
  }
  int64_t count_;
  Scratch<Unit> units_;
};

// Of one chunk: x and mask readable to the next whole vector. Elements of weight 0 may hold anything.
template <class T>
inline Moments chunk_moments(const T* x, const T* mask, int64_t n) {
  using V = typename VectorOf<T>::type;
  const V zero = V::set(0);
  V count = zero, total = zero;
  for (int64_t i = 0; i < n; i += V::W) {
    const V m = V::load(mask + i);
    count = count + m;
    total = total + select(m != zero, m * V::load(x + i), zero);
  }
  const double n_ = sum(count);
  if (n_ == 0) return {};
  const T mean = static_cast<T>(sum(total) / n_);
  const V mu = V::set(mean);
  V square = zero, rest = zero;
  for (int64_t i = 0; i < n; i += V::W) {
    const V m = V::load(mask + i);
    const V d = select(m != zero, V::load(x + i) - mu, zero);
    square = fma(m * d, d, square);
    rest = fma(m, d, rest);
  }
  return Moments::about(n_, mean, sum(rest), sum(square));
}

// (x - shift) scale + back where the mask is not 0, 0 elsewhere. x need not be padded when it is the output.
template <class T>
inline void standardize_chunk(const T* x, const T* mask, T* to, int64_t n, double shift, double scale, double back, Buffer<T>& buffer) {
  using V = typename VectorOf<T>::type;
  const V zero = V::set(0), s = V::set(static_cast<T>(shift)), r = V::set(static_cast<T>(scale)), b = V::set(static_cast<T>(back));
  int64_t i = 0;
  for (; i + V::W <= n; i += V::W) select(V::load(mask + i) != zero, fma(V::load(x + i) - s, r, b), zero).store(to + i);
  if (i == n) return;
  for (int64_t j = i; j < n; ++j) buffer.data[j] = x[j];
  for (int64_t j = n; j < i + V::W; ++j) buffer.data[j] = T(0);
  select(V::load(mask + i) != zero, fma(V::load(buffer.data + i) - s, r, b), zero).store(buffer.data + i);
  for (; i < n; ++i) to[i] = buffer.data[i];
}

}}}  // namespace
