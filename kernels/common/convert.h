// Element types in and out: rows of any dtype become float (or double) in cache, and go back rounded once.
#pragma once

#include "csrc/tensor.h"
#include "simd/simd.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };

// The arithmetic of an element type.
template <class S> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };

inline F32 load_as(const float* p, F32*) { return F32::load(p); }
inline F32 load_as(const bf16* p, F32*) { return load_bf16(reinterpret_cast<const uint16_t*>(p)); }
inline F32 load_as(const half* p, F32*) { return load_half(reinterpret_cast<const uint16_t*>(p)); }
inline F64 load_as(const double* p, F64*) { return F64::load(p); }

// Two whole vectors, the elements in any order.
template <class S, class V>
inline void load_pair(const S* p, V& a, V& b) {
  a = load_as(p, &a);
  b = load_as(p + V::W, &b);
}
inline void load_pair(const bf16* p, F32& a, F32& b) { load_bf16_pair(reinterpret_cast<const uint16_t*>(p), a, b); }

inline void store_as(float* p, F32 v) { v.store(p); }
inline void store_as(bf16* p, F32 v) { store_bf16(reinterpret_cast<uint16_t*>(p), v); }
inline void store_as(half* p, F32 v) { store_half(reinterpret_cast<uint16_t*>(p), v); }
inline void store_as(double* p, F64 v) { v.store(p); }

inline void stream_as(float* p, F32 v) { stream(p, v); }
inline void stream_as(bf16* p, F32 v) { stream_bf16(reinterpret_cast<uint16_t*>(p), v); }
inline void stream_as(half* p, F32 v) { stream_half(reinterpret_cast<uint16_t*>(p), v); }
inline void stream_as(double* p, F64 v) { stream(p, v); }

inline float to_compute(float x) { return x; }
inline float to_compute(bf16 x) { return bf16_to_float(x.bits); }
inline float to_compute(half x) { return half_to_float(x.bits); }
inline double to_compute(double x) { return x; }

template <class S, class T> inline S round_to(T x);
template <> inline float round_to<float, float>(float x) { return x; }
template <> inline bf16 round_to<bf16, float>(float x) { return {float_to_bf16(x)}; }
template <> inline half round_to<half, float>(float x) { return {float_to_half(x)}; }
template <> inline double round_to<double, double>(double x) { return x; }

// f(S{}) with the floating type behind a code.
template <class F>
inline void with_float_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(half{});
    case DType::f64: return f(double{});
    default: return f(float{});
  }
}

// The same with the types that are computed in T.
template <class T, class F>
inline void with_type_of([[maybe_unused]] DType dtype, F&& f) {
  if constexpr (sizeof(T) == 8) f(double{});
  else dtype == DType::bf16 ? f(bf16{}) : dtype == DType::f16 ? f(half{}) : f(float{});
}

// The same with the types that this level is built for: see FASTRLHF_KERNEL_F64 and _BF16.
template <class F>
inline void with_row_type([[maybe_unused]] DType dtype, F&& f) {
#if FASTRLHF_ISA_LEVEL < 2
  with_float_type(dtype, f);
#elif FASTRLHF_ISA_LEVEL == 2
  with_type_of<float>(dtype, f);
#else
  f(bf16{});
#endif
}

// f(T{}) with the type to compute in.
template <class F>
inline void with_compute_type([[maybe_unused]] bool f64, F&& f) {
#if FASTRLHF_ISA_LEVEL < 2
  if (f64) return f(double{});
#endif
  f(float{});
}

// Writes n values of `from` (readable up to the next whole vector) as S. `past_cache` streams them: for a gradient
// larger than the cache this saves reading the lines it is about to overwrite.
template <class S, class T>
inline void write_row(S* to, const T* from, int64_t n, bool past_cache) {
  using V = typename VectorOf<T>::type;
  int64_t i = 0;
  constexpr int64_t bytes = V::W * static_cast<int64_t>(sizeof(S));
  if (past_cache) {
    while (i < n && reinterpret_cast<uintptr_t>(to + i) % bytes) { to[i] = round_to<S, T>(from[i]); ++i; }
    for (; i + V::W <= n; i += V::W) stream_as(to + i, V::load(from + i));
  } else {
    for (; i + V::W <= n; i += V::W) store_as(to + i, V::load(from + i));
  }
  for (; i < n; ++i) to[i] = round_to<S, T>(from[i]);
}

}}}  // namespace
