#pragma once

#include "args.h"
#include "csrc/isa.h"

namespace fastrlhf {

inline bool is_f64(const LinearArgs& a) { return a.row.logits.dtype == DType::f64; }
inline bool is_f64(const LinearBackwardArgs& b) { return is_f64(b.forward); }
// Products of bf16 by bf16, in tiles: the dot products of a kept set are single ones.
inline bool is_bf16(const LinearArgs& a) { return a.hidden.dtype == DType::bf16 && a.weight.dtype == DType::bf16 && !a.row.kept_indptr; }
inline bool is_bf16(const LinearBackwardArgs& b) { return is_bf16(b.forward); }

FASTRLHF_KERNEL_BF16(LinearArgs, linear_logprobs_forward)
FASTRLHF_KERNEL_BF16(LinearBackwardArgs, linear_logprobs_backward)
FASTRLHF_KERNEL_F64(StoredLanes, linear_logprobs_stored_lanes)

// Elements of `LinearArgs::logits` for so many rows and columns, at any instruction set: [panel of `lanes` rows][column][lane].
constexpr int64_t stored_size(int64_t rows, int64_t vocab) { return (rows + 31) / 32 * 32 * vocab; }

}  // namespace fastrlhf
