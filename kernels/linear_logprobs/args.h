#pragma once

#include "logprobs/args.h"

namespace fastrlhf {

// logprobs of hidden (rows, width) times weight (vocab, width), transposed, plus bias.
struct LinearArgs {
  LogprobsArgs row;            // labels, scaling, kept set, results, sizes; row.logits: dtype alone, float32 or float64
  Matrix hidden, weight;       // all three float64, or none
  int64_t width = 0;
  const void* bias = nullptr;  // (vocab)
  DType bias_dtype = DType::f32;
  int64_t workspace_bytes = 0;
  void* logits = nullptr;      // kept from a forward for its backward: see `stored_size`; all rows in one block
};

// What `LinearArgs::logits` hold the rows of side by side.
struct StoredLanes {
  bool f64;
  int64_t* lanes;
};

struct LinearBackwardArgs {
  LinearArgs forward;                   // its inputs and max, log_sum, entropies
  const void* grad_logprobs = nullptr;  // (rows, labels_per_row)
  const void* grad_entropy = nullptr;   // (rows) or null
  const void* grad_lse = nullptr;       // (rows) or null
  void* grad_hidden = nullptr;          // (rows, width), hidden's dtype, contiguous; or null
  void* grad_weight = nullptr;          // (vocab, width), contiguous; or null
  DType grad_weight_dtype = DType::f32;
  void* grad_bias = nullptr;            // (vocab), float32 or float64; or null
  bool accumulate = false;              // add to grad_weight and grad_bias
  bool narrow_sums = false;             // a narrow grad_weight may be added to itself
  bool rounded = false;                 // the logits' gradient may be rounded to bfloat16, where that is faster
};

}  // namespace fastrlhf
