#pragma once

#include "csrc/isa.h"
#include "csrc/tensor.h"

namespace fastrlhf {

// Per-row settings are (rows) doubles or null for the scalar beside them.
struct SampleArgs {
  Matrix logits;
  int64_t rows = 0, vocab = 0;
  double temperature = 1, top_p = 1, min_p = 0;
  int64_t top_k = 0;
  const double *temperatures = nullptr, *top_ps = nullptr, *min_ps = nullptr;
  const int64_t* top_ks = nullptr;
  int64_t seed = 0;
  const int64_t* seeds = nullptr;      // (rows): row r draws from (seeds[r], 0), else from (seed, r)
  int64_t* tokens = nullptr;           // (rows)
  void* logprobs = nullptr;            // (rows) or null
  void* thresholds = nullptr;          // (rows): the kept set is the logits >= this; or null
  int64_t* kept_counts = nullptr;      // (rows) or null
  int threads = 1;
};

struct KeptArgs {
  Matrix logits;
  int64_t rows = 0, vocab = 0;
  const void* thresholds = nullptr;
  const int64_t* indptr = nullptr;     // (rows + 1)
  int64_t* indices = nullptr;
  int threads = 1;
};

FASTRLHF_KERNEL(SampleArgs, sample)
FASTRLHF_KERNEL(KeptArgs, kept_indices)

}  // namespace fastrlhf
