// 8 floats in a ymm register (AVX2, FMA, F16C).
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

struct F32 {
  using T = float;
  static constexpr int W = 8;
  static constexpr bool fuses = true;  // fma and fms round once
  struct Mask {
    __m256 m;
    friend Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.m, b.m)}; }
    friend Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
    friend Mask operator~(Mask a) { return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
  };
  __m256 r;

  static F32 set(float x) { return {_mm256_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  void store(float* p) const { _mm256_storeu_ps(p, r); }

  friend F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.r, b.r)}; }
  friend F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.r, b.r)}; }
  friend F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.r, b.r)}; }
  friend F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.r, b.r)}; }
  friend F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }
  friend F32 fms(F32 a, F32 b, F32 c) { return {_mm256_fmsub_ps(a.r, b.r, c.r)}; }
  friend F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.r, b.r)}; }
  friend F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.r, b.r)}; }
  friend Mask operator<(F32 a, F32 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LT_OQ)}; }
  friend Mask operator>(F32 a, F32 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_GT_OQ)}; }
  friend Mask operator<=(F32 a, F32 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LE_OQ)}; }
  friend Mask operator>=(F32 a, F32 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_GE_OQ)}; }
  friend Mask operator!=(F32 a, F32 b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_NEQ_UQ)}; }
  friend F32 select(Mask m, F32 a, F32 b) { return {_mm256_blendv_ps(b.r, a.r, m.m)}; }
  // lane i takes lane i + k; `fill` comes in at the end
  template <int k> static F32 down(F32 a, F32 fill) {
    static_assert(0 < k && k < W, "within the vector");
    const __m256i x = _mm256_castps_si256(a.r), y = _mm256_castps_si256(fill.r);
    const __m256i middle = _mm256_permute2x128_si256(x, y, 0x21);  // x's upper half, y's lower
    if constexpr (k < 4) return {_mm256_castsi256_ps(_mm256_alignr_epi8(middle, x, 4 * k))};
    else return {_mm256_castsi256_ps(_mm256_alignr_epi8(y, middle, 4 * (k - 4)))};
  }
  friend float first(F32 a) { return _mm256_cvtss_f32(a.r); }
  friend float sum(F32 a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  friend float highest(F32 a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
  friend float lowest(F32 a) {
    __m128 x = _mm_min_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
    x = _mm_min_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_min_ss(x, _mm_shuffle_ps(x, x, 1)));
  }
};

inline F32 round(F32 x) { return {_mm256_round_ps(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// p * 2^n for whole n in [-126, 127]
inline F32 power2(F32 p, F32 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.r), _mm256_set1_epi32(127));
  return p * F32{_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
}

// p * 2^n for whole n; exact 0 below the float range
inline F32 scale2(F32 p, F32 n) {
  const F32 low = F32::set(-126.f);
  const F32 c = min(max(n, low), F32::set(254.f)), c1 = min(c, F32::set(127.f));
  return select(n < low, p * F32::set(0.f), power2(power2(p, c1), c - c1));
}

// sums[lane] += x[lane], in double precision
inline void accumulate(double* sums, F32 x) {
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_cvtps_pd(_mm256_castps256_ps128(x.r))));
  _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), _mm256_cvtps_pd(_mm256_extractf128_ps(x.r, 1))));
}

inline F32 load_bf16(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
}
inline F32 load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline __m128i pack_bf16(F32 x) {
  const __m256i bits = _mm256_castps_si256(x.r);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.r, x.r, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_packus_epi32(high, high);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x88));
}
inline __m128i pack_half(F32 x) { return _mm256_cvtps_ph(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store_bf16(uint16_t* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), pack_bf16(x)); }
inline void store_half(uint16_t* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), pack_half(x)); }

// Two vectors of consecutive elements, each element in one of them: the order is the cheapest.
inline void load_bf16_pair(const uint16_t* p, F32& a, F32& b) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a.r = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  b.r = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Past the cache; p is aligned to the store.
inline void stream(float* p, F32 x) { _mm256_stream_ps(p, x.r); }
inline void stream_bf16(uint16_t* p, F32 x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), pack_bf16(x)); }
inline void stream_half(uint16_t* p, F32 x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), pack_half(x)); }
inline void stream_end() { _mm_sfence(); }

}}}  // namespace
