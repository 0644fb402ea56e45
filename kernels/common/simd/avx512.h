// 16 floats in a zmm register (AVX-512 F, DQ, BW, VL; BF16 conversions at the avx512_bf16 level).
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

struct F32 {
  using T = float;
  static constexpr int W = 16;
  static constexpr bool fuses = true;  // fma and fms round once
  struct Mask {
    __mmask16 m;
    friend Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & b.m)}; }
    friend Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
    friend Mask operator~(Mask a) { return {static_cast<__mmask16>(~a.m)}; }
  };
  __m512 r;

  static F32 set(float x) { return {_mm512_set1_ps(x)}; }
  static F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  void store(float* p) const { _mm512_storeu_ps(p, r); }

  friend F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.r, b.r)}; }
  friend F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.r, b.r)}; }
  friend F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.r, b.r)}; }
  friend F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.r, b.r)}; }
  friend F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }
  friend F32 fms(F32 a, F32 b, F32 c) { return {_mm512_fmsub_ps(a.r, b.r, c.r)}; }
  friend F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.r, b.r)}; }
  friend F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.r, b.r)}; }
  friend Mask operator<(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_LT_OQ)}; }
  friend Mask operator>(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_GT_OQ)}; }
  friend Mask operator<=(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_LE_OQ)}; }
  friend Mask operator>=(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_GE_OQ)}; }
  friend Mask operator!=(F32 a, F32 b) { return {_mm512_cmp_ps_mask(a.r, b.r, _CMP_NEQ_UQ)}; }
  friend F32 select(Mask m, F32 a, F32 b) { return {_mm512_mask_blend_ps(m.m, b.r, a.r)}; }
  // lane i takes lane i + k; `fill` comes in at the end
  template <int k> static F32 down(F32 a, F32 fill) {
    return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(fill.r), _mm512_castps_si512(a.r), k))};
  }
  friend float first(F32 a) { return _mm512_cvtss_f32(a.r); }
  friend float sum(F32 a) { return _mm512_reduce_add_ps(a.r); }
  friend float highest(F32 a) { return _mm512_reduce_max_ps(a.r); }
  friend float lowest(F32 a) { return _mm512_reduce_min_ps(a.r); }
};

inline F32 round(F32 x) { return {_mm512_roundscale_ps(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 scale2(F32 p, F32 n) { return {_mm512_scalef_ps(p.r, n.r)}; }

// sums[lane] += x[lane], in double precision
inline void accumulate(double* sums, F32 x) {
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_cvtps_pd(_mm512_castps512_ps256(x.r))));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.r, 1))));
}

inline F32 load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
inline F32 load_half(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline __m256i pack_bf16(F32 x) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(x.r);
#else
  const __m512i bits = _mm512_castps_si512(x.r);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.r, x.r, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
#endif
}
inline __m256i pack_half(F32 x) { return _mm512_cvtps_ph(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline void store_bf16(uint16_t* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_bf16(x)); }
inline void store_half(uint16_t* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_half(x)); }

// Two vectors of consecutive elements, each element in one of them: the order is the cheapest.
inline void load_bf16_pair(const uint16_t* p, F32& a, F32& b) {
  const __m512i x = _mm512_loadu_si512(p);
  a.r = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  b.r = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Past the cache; p is aligned to the store.
inline void stream(float* p, F32 x) { _mm512_stream_ps(p, x.r); }
inline void stream_bf16(uint16_t* p, F32 x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack_bf16(x)); }
inline void stream_half(uint16_t* p, F32 x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack_half(x)); }
inline void stream_end() { _mm_sfence(); }

}}}  // namespace
