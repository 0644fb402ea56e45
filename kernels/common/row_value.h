// One value of a (B) input, whatever its dtype: for the ops that run over sequences, not tokens.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/tensor.h"

namespace fastrlhf {

inline float half_bits_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu, fraction = h & 0x3ffu;
  if (exponent == 0) {
    const float f = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -f : f;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (fraction << 13);
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline int64_t row_integer(const Array& a, int64_t i) {
  i *= a.row_stride;
  return a.dtype == DType::i32 ? static_cast<const int32_t*>(a.data)[i] : static_cast<const int64_t*>(a.data)[i];
}

inline double row_value(const Array& a, int64_t i) {
  const int64_t at = i * a.row_stride;
  switch (a.dtype) {
    case DType::f64: return static_cast<const double*>(a.data)[at];
    case DType::f32: return static_cast<const float*>(a.data)[at];
    case DType::f16: return half_bits_to_float(static_cast<const uint16_t*>(a.data)[at]);
    case DType::bf16: {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(a.data)[at]) << 16;
      float f;
      std::memcpy(&f, &bits, 4);
      return f;
    }
    case DType::u8: return static_cast<const uint8_t*>(a.data)[at];
    default: return static_cast<double>(row_integer(a, i));
  }
}

}  // namespace fastrlhf
