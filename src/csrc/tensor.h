// What the extension knows of a tensor: an address, an element type and strides. No torch header anywhere.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastrlhf {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, i32 = 4, i64 = 5, u8 = 6 };

inline int64_t element_size(DType t) {
  switch (t) {
    case DType::f64: case DType::i64: return 8;
    case DType::f32: case DType::i32: return 4;
    case DType::bf16: case DType::f16: return 2;
    default: return 1;
  }
}

// Logits and other (rows, cols) matrices whose rows may come from a sliced (outer, inner, cols) tensor:
// row r starts at (r / inner) * outer_stride + (r % inner) * inner_stride; the last stride is 1.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;

  FASTRLHF_HOST_DEVICE int64_t offset(int64_t row) const { return (row / inner) * outer_stride + (row % inner) * inner_stride; }
};

// An input of the token-level ops, (B, T), packed (total) or one value a row (B); nullptr: absent.
struct Array {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t row_stride = 0, col_stride = 0;
  bool per_row = false;

  FASTRLHF_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

// The rows of a token-level op: (B, T), or the segments of a pack when cu_seqlens is there.
struct Rows {
  int64_t count = 0, length = 0;        // length: T, or the longest segment of a pack
  const int64_t* cu_seqlens = nullptr;  // (B + 1)
  int64_t tokens = 0;                   // of the pack

  FASTRLHF_HOST_DEVICE int64_t size(int64_t b) const { return cu_seqlens ? cu_seqlens[b + 1] - cu_seqlens[b] : length; }
  // where row b starts in a contiguous output
  FASTRLHF_HOST_DEVICE int64_t start(int64_t b) const { return cu_seqlens ? cu_seqlens[b] : b * length; }
  FASTRLHF_HOST_DEVICE int64_t total() const { return cu_seqlens ? tokens : count * length; }
  FASTRLHF_HOST_DEVICE int64_t offset(const Array& a, int64_t b, int64_t t) const {
    if (a.per_row) return b * a.row_stride;
    return cu_seqlens ? (cu_seqlens[b] + t) * a.col_stride : b * a.row_stride + t * a.col_stride;
  }
};

}  // namespace fastrlhf
