#pragma once

#include "logprobs/args.h"

namespace fastrlhf {

struct Operand {
  const void* data = nullptr;        // bfloat16 rows, at multiples of 16 bytes
  int64_t row_stride = 0;            // elements
};

struct LinearLogprobsArgs {
  // What `logprobs` is asked of logits = hidden weight^T + bias; there is no matrix of logits, no kept set, and one label a row.
  LogprobsArgs forward;
  Operand hidden, weight;            // (rows, width), (vocab, width)
  int64_t width = 0;
  const void* bias = nullptr;        // (vocab) or null
  DType bias_dtype = DType::f32;
  const void* row_count = nullptr;   // one integer on the device: only so many of the rows count; null: all
  DType row_count_dtype = DType::i64;
};

// The forward of rows whose gradient comes next, without a second product: besides the partials,
struct LinearLogprobsExponentialsArgs {
  LinearLogprobsArgs linear;
  void* exponentials = nullptr;         // (rows, vocab) bfloat16, e^((x - reference) / T)
  int64_t stride = 0;                   // elements, a multiple of 16 bytes
  float* references = nullptr;          // (tiles of 256 columns, rows)
};

struct LinearLogprobsGradientArgs {
  LinearLogprobsArgs linear;            // with the max, log_sum and entropies that `logprobs_combine` gave for the whole vocabulary
  const void* grad_logprobs = nullptr;  // (rows) or null, as the two others; float32
  const void* grad_entropy = nullptr;
  const void* grad_lse = nullptr;
  void* grad = nullptr;                 // (rows, vocab), of the logits before bias and soft cap; rows that do not count get zeros
  DType grad_dtype = DType::bf16;       // or f32
  int64_t grad_stride = 0;              // elements, a multiple of 16 bytes
};

// The same gradient, in place of the exponentials. A label's own probability is taken from its log-prob: rounded, it would leave
// nothing of 1 - p.
struct ExponentialsToGradientArgs {
  LinearLogprobsExponentialsArgs of;    // linear: without operands, with max, log_sum, entropies and logprobs
  const void* grad_logprobs = nullptr;
  const void* grad_entropy = nullptr;
  const void* grad_lse = nullptr;
};

// How a vocabulary is cut into parts with statistics of their own: by its size alone, so that a row's bits depend on nothing else.
struct VocabSplit {
  static constexpr int64_t tile = 256, most_parts = 128;
  int64_t tiles = 0, tiles_per_part = 1, parts = 0;

  FASTRLHF_HOST_DEVICE explicit VocabSplit(int64_t vocab) : tiles((vocab + tile - 1) / tile) {
    tiles_per_part = (tiles + most_parts - 1) / most_parts;
    if (tiles_per_part < 1) tiles_per_part = 1;
    parts = (tiles + tiles_per_part - 1) / tiles_per_part;
  }
};

}  // namespace fastrlhf
