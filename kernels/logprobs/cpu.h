#pragma once

#include "args.h"
#include "csrc/isa.h"

namespace fastrlhf {

inline bool is_f64(const LogprobsArgs& a) { return a.logits.dtype == DType::f64; }
inline bool is_f64(const LogprobsBackwardArgs& b) { return is_f64(b.forward); }
inline bool is_f64(const LogprobsCombineArgs& c) { return is_f64(c.forward); }
inline bool is_bf16(const LogprobsArgs& a) { return a.logits.dtype == DType::bf16; }
inline bool is_bf16(const LogprobsBackwardArgs& b) { return is_bf16(b.forward); }

FASTRLHF_KERNEL_BF16(LogprobsArgs, logprobs_forward)
FASTRLHF_KERNEL_BF16(LogprobsBackwardArgs, logprobs_backward)
FASTRLHF_KERNEL_F64(LogprobsCombineArgs, logprobs_combine)

}  // namespace fastrlhf
