// One value of a (B) input, whatever its dtype: for the ops that run over sequences, not tokens.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "csrc/tensor.h"

namespace fastrlhf {

inline int64_t row_integer(const Array& a, int64_t i) {
  i *= a.row_stride;
  return a.dtype == DType::i32 ? static_cast<const int32_t*>(a.data)[i] : static_cast<const int64_t*>(a.data)[i];
}

inline double row_value(const Array& a, int64_t i) {
  const int64_t at = i * a.row_stride;
  switch (a.dtype) {
    case DType::f64: return static_cast<const double*>(a.data)[at];
    case DType::f32: return static_cast<const float*>(a.data)[at];
    case DType::f16: return half_to_float(static_cast<const uint16_t*>(a.data)[at]);
    case DType::bf16: return bf16_to_float(static_cast<const uint16_t*>(a.data)[at]);
    case DType::u8: return static_cast<const uint8_t*>(a.data)[at];
    default: return static_cast<double>(row_integer(a, i));
  }
}

}  // namespace fastrlhf
