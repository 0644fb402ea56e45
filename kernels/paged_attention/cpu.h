#pragma once

#include "csrc/isa.h"
#include "csrc/tensor.h"

namespace fastrlhf {

constexpr int64_t paged_block = 16;  // positions in a block of the cache

// tokens rows of q (heads, dim), k and v (kv_heads, dim), each row contiguous; all of one dtype, the caches' too.
struct PagedAttentionArgs {
  DType dtype = DType::f32;
  int64_t tokens = 0, heads = 0, kv_heads = 0, dim = 0;
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  int64_t q_stride = 0, k_stride = 0, v_stride = 0;  // between tokens
  const float *cos = nullptr, *sin = nullptr;        // (positions, dim / 2)
  const int64_t* positions = nullptr;                // (tokens)
  const int64_t* sequences = nullptr;                // (tokens): row of the block table
  const int32_t* block_table = nullptr;              // (rows, table_width)
  int64_t table_width = 0;
  void* k_cache = nullptr;                           // (blocks, kv_heads, dim, paged_block)
  void* v_cache = nullptr;                           // (blocks, kv_heads, paged_block, padded)
  int64_t padded = 0;                                // dim rounded up to 16
  float scale = 1;
  int64_t window = 0;                                // 0: all
  void* out = nullptr;                               // (tokens, heads, dim)
  int threads = 1;
};

FASTRLHF_KERNEL(PagedAttentionArgs, paged_attention)

}  // namespace fastrlhf
