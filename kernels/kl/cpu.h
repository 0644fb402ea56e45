#pragma once

#include "csrc/isa.h"
#include "csrc/tensor.h"

namespace fastrlhf {

struct KlArgs {
  Rows rows;
  bool f64 = false;
  Array logprobs, ref_logprobs;
  int kind = 0;
  double clamp_input = 0, clamp_output = 0;  // infinite for none
  bool straight_through = false;
  const void* grad = nullptr;   // backward: (total), of the compute type
  void* out = nullptr;          // (total): the value, or the gradient of logprobs
  int threads = 1;
};

enum class KlDirection : int { forward = 0, reverse = 1, js = 2 };

struct KlFullArgs {
  Matrix logits, ref_logits;    // one dtype
  int64_t rows = 0, vocab = 0;
  KlDirection direction = KlDirection::forward;
  double temperature = 1;
  const uint8_t* mask = nullptr;     // (rows)
  void* out = nullptr;               // (rows)
  void* stats = nullptr;             // (rows, 4): max and log-sum of each, for the backward
  const void* grad = nullptr;        // backward: (rows)
  Matrix grad_logits, grad_ref_logits;  // data nullptr: not wanted
  int threads = 1;
};

inline bool is_f64(const KlFullArgs& a) { return a.logits.dtype == DType::f64; }

FASTRLHF_KERNEL_F64(KlArgs, kl)
FASTRLHF_KERNEL_F64(KlFullArgs, kl_full_forward)
FASTRLHF_KERNEL_F64(KlFullArgs, kl_full_backward)

}  // namespace fastrlhf
