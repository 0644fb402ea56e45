// The portable vector: GCC/Clang vector extensions, which every target lowers to what it has (SSE2, NEON, plain code).
// It is the whole of the `scalar` level, and the double-precision arithmetic of every level.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/half.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

template <class T> struct IntOf;
template <> struct IntOf<float> { using type = int32_t; };
template <> struct IntOf<double> { using type = int64_t; };

template <class Elem, int Lanes>
struct Portable {
  using T = Elem;
  using I = typename IntOf<T>::type;
  static constexpr int W = Lanes;
  static constexpr bool fuses = false;  // fma and fms round once
  typedef T Reg __attribute__((vector_size(sizeof(T) * Lanes)));
  typedef I Mask __attribute__((vector_size(sizeof(T) * Lanes)));
  Reg r;

  static Portable set(T x) { return {Reg{} + x}; }
  static Portable load(const T* p) { Portable v; std::memcpy(&v.r, p, sizeof(Reg)); return v; }
  void store(T* p) const { std::memcpy(p, &r, sizeof(Reg)); }

  friend Portable operator+(Portable a, Portable b) { return {a.r + b.r}; }
  friend Portable operator-(Portable a, Portable b) { return {a.r - b.r}; }
  friend Portable operator*(Portable a, Portable b) { return {a.r * b.r}; }
  friend Portable operator/(Portable a, Portable b) { return {a.r / b.r}; }
  friend Portable fma(Portable a, Portable b, Portable c) { return {a.r * b.r + c.r}; }
  friend Portable fms(Portable a, Portable b, Portable c) { return {a.r * b.r - c.r}; }
  // b where either is NaN, as the x86 instructions do
  friend Portable max(Portable a, Portable b) { return select(a.r > b.r, a, b); }
  friend Portable min(Portable a, Portable b) { return select(a.r < b.r, a, b); }
  friend Mask operator<(Portable a, Portable b) { return a.r < b.r; }
  friend Mask operator>(Portable a, Portable b) { return a.r > b.r; }
  friend Mask operator<=(Portable a, Portable b) { return a.r <= b.r; }
  friend Mask operator>=(Portable a, Portable b) { return a.r >= b.r; }
  friend Mask operator!=(Portable a, Portable b) { return a.r != b.r; }
  friend Portable select(Mask m, Portable a, Portable b) {
    Mask x, y;
    std::memcpy(&x, &a.r, sizeof x);
    std::memcpy(&y, &b.r, sizeof y);
    x = (x & m) | (y & ~m);
    Portable v;
    std::memcpy(&v.r, &x, sizeof x);
    return v;
  }
  // lane i takes lane i + k; `fill` comes in at the end
  template <int k> static Portable down(Portable a, Portable fill) {
    T both[2 * Lanes];
    a.store(both);
    fill.store(both + Lanes);
    return load(both + k);
  }
  friend T first(Portable a) { return a.r[0]; }
  friend T sum(Portable a) {  // pairwise, always in this order
    T x[Lanes];
    a.store(x);
    for (int n = Lanes / 2; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) x[i] += x[i + n];
    return x[0];
  }
  friend T highest(Portable a) {
    T x = a.r[0];
    for (int i = 1; i < Lanes; ++i) x = a.r[i] > x ? a.r[i] : x;
    return x;
  }
  friend T lowest(Portable a) {
    T x = a.r[0];
    for (int i = 1; i < Lanes; ++i) x = a.r[i] < x ? a.r[i] : x;
    return x;
  }
};

// sums[lane] += x[lane], in double precision
template <class T, int Lanes>
inline void accumulate(double* sums, Portable<T, Lanes> x) {
  for (int i = 0; i < Lanes; ++i) sums[i] += static_cast<double>(x.r[i]);
}

template <int Lanes>
inline Portable<float, Lanes> round(Portable<float, Lanes> x) {  // |x| < 2^22
  const auto magic = Portable<float, Lanes>::set(12582912.f);
  return (x + magic) - magic;
}

// p * 2^n for whole n in [-126, 127]
template <int Lanes>
inline Portable<float, Lanes> power2(Portable<float, Lanes> p, Portable<float, Lanes> n) {
  const auto bits = (__builtin_convertvector(n.r, typename Portable<float, Lanes>::Mask) + 127) << 23;
  Portable<float, Lanes> s;
  std::memcpy(&s.r, &bits, sizeof bits);
  return p * s;
}

// p * 2^n for whole n; exact 0 below the float range
template <int Lanes>
inline Portable<float, Lanes> scale2(Portable<float, Lanes> p, Portable<float, Lanes> n) {
  using V = Portable<float, Lanes>;
  using M = typename V::Mask;
  const V low = V::set(-126.f), high = V::set(254.f);
  V c = min(max(n, low), high);
  V c1 = min(c, V::set(127.f)), c2 = c - c1;  // two factors: 2^128 has no float
  M e1 = (__builtin_convertvector(c1.r, M) + 127) << 23, e2 = (__builtin_convertvector(c2.r, M) + 127) << 23;
  V s1, s2;
  std::memcpy(&s1.r, &e1, sizeof e1);
  std::memcpy(&s2.r, &e2, sizeof e2);
  return select(n < low, p * V::set(0.f), p * s1 * s2);
}

#define FASTRLHF_LANEWISE(name, expression)                             \
  template <int Lanes>                                                  \
  inline Portable<double, Lanes> name(Portable<double, Lanes> x) {      \
    for (int i = 0; i < Lanes; ++i) {                                   \
      const double v = x.r[i];                                          \
      x.r[i] = expression;                                              \
    }                                                                   \
    return x;                                                           \
  }
FASTRLHF_LANEWISE(exp, std::exp(v))
FASTRLHF_LANEWISE(exp2, std::exp2(v))
FASTRLHF_LANEWISE(log_1_to_2, std::log(v))
FASTRLHF_LANEWISE(tanh, std::tanh(v))
FASTRLHF_LANEWISE(expm1_minus_x, std::abs(v) < 0.5 ? v * v * (1. / 2 + v * (1. / 6 + v * (1. / 24 + v * (1. / 120 + v * (1. / 720 + v * (1. / 5040 + v * (1. / 40320 + v * (1. / 362880 + v * (1. / 3628800 + v * (1. / 39916800 + v / 479001600)))))))))) : std::expm1(v) - v)
#undef FASTRLHF_LANEWISE

}}}  // namespace
