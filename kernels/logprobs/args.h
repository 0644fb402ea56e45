#pragma once

#include "csrc/tensor.h"

namespace fastrlhf {

struct LogprobsArgs {
  Matrix logits;
  int64_t rows = 0, vocab = 0;       // vocab: columns held here
  const void* labels = nullptr;      // (rows, labels_per_row), contiguous, global ids
  DType label_dtype = DType::i64;
  int64_t labels_per_row = 1, vocab_start = 0, ignore_index = -100;
  double temperature = 1, softcap = 0;            // softcap 0: none
  const double* temperatures = nullptr;           // (rows), instead of temperature
  const uint8_t* kept_mask = nullptr;             // (rows, vocab), contiguous
  const int64_t* kept_indptr = nullptr;           // (rows + 1); with kept_indices, global ids
  const int64_t* kept_indices = nullptr;
  bool entropy = false, partial = false;
  // float32, or float64 where the logits are
  void* logprobs = nullptr;          // (rows, labels_per_row)
  void* entropies = nullptr;         // (rows)
  void* lse = nullptr;               // (rows)
  void* max = nullptr;               // (rows), of the soft-capped logits
  void* log_sum = nullptr;           // (rows), log of the sum of exp((x - max) / temperature)
  void* partials = nullptr;          // partial: (rows, 3 + labels_per_row): max, sum, weighted sum, label logits
  int threads = 1;
};

struct LogprobsBackwardArgs {
  LogprobsArgs forward;              // its inputs and max, log_sum, entropies
  const void* grad_logprobs = nullptr;  // (rows, labels_per_row)
  const void* grad_entropy = nullptr;   // (rows) or null
  const void* grad_lse = nullptr;       // (rows) or null
  Matrix grad;                       // the logits' dtype; may be the logits themselves
};

struct LogprobsCombineArgs {
  const void* partials = nullptr;    // (ranks, rows, 3 + labels_per_row)
  int64_t ranks = 1;
  LogprobsArgs forward;
};

}  // namespace fastrlhf
