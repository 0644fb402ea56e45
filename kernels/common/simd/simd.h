// F32 and F64: the vectors of the instruction set this file is being compiled for, and the elementary functions on
// them, written once for every level.
#pragma once

#include "common/host_device.h"

#if defined(FASTRLHF_GPU)
#include "lane.h"
#elif FASTRLHF_ISA_LEVEL >= 2
#include "avx512.h"
#elif FASTRLHF_ISA_LEVEL == 1
#include "avx2.h"
#else
#include "scalar.h"
namespace fastrlhf { namespace FASTRLHF_ISA { namespace {
using F32 = Portable<float, 4>;

inline F32 load_bf16(const uint16_t* p) {
  F32 v;
  for (int i = 0; i < F32::W; ++i) v.r[i] = bf16_to_float(p[i]);
  return v;
}
inline F32 load_half(const uint16_t* p) {
  F32 v;
  for (int i = 0; i < F32::W; ++i) v.r[i] = half_to_float(p[i]);
  return v;
}
inline void load_bf16_pair(const uint16_t* p, F32& a, F32& b) {
  a = load_bf16(p);
  b = load_bf16(p + F32::W);
}
inline void store_bf16(uint16_t* p, F32 x) { for (int i = 0; i < F32::W; ++i) p[i] = float_to_bf16(x.r[i]); }
inline void store_half(uint16_t* p, F32 x) { for (int i = 0; i < F32::W; ++i) p[i] = float_to_half(x.r[i]); }
inline void stream(float* p, F32 x) { x.store(p); }
inline void stream_bf16(uint16_t* p, F32 x) { store_bf16(p, x); }
inline void stream_half(uint16_t* p, F32 x) { store_half(p, x); }
inline void stream_end() {}
}}}  // namespace
#endif

#if !defined(FASTRLHF_GPU)
namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

// As wide as a register and no wider: GCC takes wider vectors apart into pieces that it then spills.
#if FASTRLHF_ISA_LEVEL == 0
using F64 = Portable<double, 2>;
#else
using F64 = Portable<double, 4>;
#endif

inline void stream(double* p, F64 x) { x.store(p); }

template <class T> struct VectorOf;
template <> struct VectorOf<float> { using type = F32; };
template <> struct VectorOf<double> { using type = F64; };

// 2^f = 1 + f q(f), relative error 9e-8; exactly 1 at 0, where the largest logit sits.
#if FASTRLHF_ISA_LEVEL >= 2
// The fraction and the scaling are one instruction each: f in [0, 1), and both take -inf to an exact 0.
inline F32 exp2(F32 t) {
  const F32 f{_mm512_reduce_ps(t.r, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  F32 q = F32::set(1.86711829e-3f);
  q = fma(q, f, F32::set(9.01705492e-3f));
  q = fma(q, f, F32::set(5.57998940e-2f));
  q = fma(q, f, F32::set(2.40164459e-1f));
  q = fma(q, f, F32::set(6.93151295e-1f));
  return {_mm512_scalef_ps(fma(q, f, F32::set(1.f)).r, t.r)};
}
#else
inline F32 exp2(F32 t) {  // t <= 127
  const F32 low = F32::set(-126.f), clamped = max(low, t), n = round(clamped), f = clamped - n;
  F32 q = F32::set(1.32646994e-3f);
  q = fma(q, f, F32::set(9.67150927e-3f));
  q = fma(q, f, F32::set(5.55073395e-2f));
  q = fma(q, f, F32::set(2.40222424e-1f));
  q = fma(q, f, F32::set(6.93147004e-1f));
  return select(t < low, F32::set(0.f), power2(fma(q, f, F32::set(1.f)), n));
}
#endif

// e^x, about 1 ulp; 0, inf and NaN where they belong.
inline F32 exp(F32 x) {
  x = min(F32::set(89.f), max(F32::set(-110.f), x));
  const F32 n = round(x * F32::set(1.44269504f));
  F32 r = fma(n, F32::set(-0.693359375f), x);
  r = fma(n, F32::set(2.12194440e-4f), r);
  F32 q = F32::set(1.9875691500e-4f);
  q = fma(q, r, F32::set(1.3981999507e-3f));
  q = fma(q, r, F32::set(8.3334519073e-3f));
  q = fma(q, r, F32::set(4.1665795894e-2f));
  q = fma(q, r, F32::set(1.6666665459e-1f));
  q = fma(q, r, F32::set(5.0000001201e-1f));
  return scale2(fma(q * r, r, r) + F32::set(1.f), n);
}

// log x for x in [1, 2], about 1 ulp of 1: 2 atanh(z), z = (x - 1) / (x + 1).
inline F32 log_1_to_2(F32 x) {
  const F32 one = F32::set(1.f), z = (x - one) / (x + one), w = z * z;
  F32 q = F32::set(1.f / 13);
  q = fma(q, w, F32::set(1.f / 11));
  q = fma(q, w, F32::set(1.f / 9));
  q = fma(q, w, F32::set(1.f / 7));
  q = fma(q, w, F32::set(1.f / 5));
  q = fma(q, w, F32::set(1.f / 3));
  return fma(q * w, z, z) * F32::set(2.f);
}

// tanh as Cephes' tanhf: a polynomial below 0.625, (1 - e^-2|x|) / (1 + e^-2|x|) above.
inline F32 tanh(F32 x) {
  const F32 one = F32::set(1.f), zero = F32::set(0.f), negative = zero - x;
  const F32 a = max(x, negative);
  const F32 e = exp(a * F32::set(-2.f));
  const F32 large = (one - e) / (one + e);
  const F32 z = x * x;
  F32 q = F32::set(-5.70498872745e-3f);
  q = fma(q, z, F32::set(2.06390887954e-2f));
  q = fma(q, z, F32::set(-5.37397155531e-2f));
  q = fma(q, z, F32::set(1.33314422036e-1f));
  q = fma(q, z, F32::set(-3.33332819422e-1f));
  const F32 small = fma(q * z, x, x);
  return select(a < F32::set(0.625f), small, select(x < zero, zero - large, large));
}

}}}  // namespace
#endif

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

// e^x - 1 - x without cancellation.
FASTRLHF_HOST_DEVICE inline F32 expm1_minus_x(F32 x) {
  F32 q = F32::set(2.48015873e-5f);
  q = fma(q, x, F32::set(1.98412698e-4f));
  q = fma(q, x, F32::set(1.38888889e-3f));
  q = fma(q, x, F32::set(8.33333333e-3f));
  q = fma(q, x, F32::set(4.16666667e-2f));
  q = fma(q, x, F32::set(1.66666667e-1f));
  q = fma(q, x, F32::set(0.5f));
  const F32 small = q * x * x, half = F32::set(0.5f);
  return select((x > F32::set(-0.5f)) & (x < half), small, exp(x) - F32::set(1.f) - x);
}

}}}  // namespace
