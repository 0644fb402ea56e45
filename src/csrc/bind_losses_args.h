// The arguments of the policy and value losses as Python hands them over, for either module.
#pragma once

#include <iterator>

#include "bind.h"
#include "policy_loss/args.h"
#include "value_loss/args.h"

namespace fastrlhf {

// arrays: logprobs, old_logprobs, advantages, mask, rollout_logprobs, ref_logprobs, entropy
// scalars: clip_low, clip_high, dual_clip, ratio_clamp, delta, tau_pos, tau_neg, correction_low, correction_high,
//          kl_coef, entropy_coef, denominator
// codes: kind, correction, correction_level, kl_kind, reduction
inline PolicyArgs policy_args(const Rows& rows, const py::tuple& arrays, const py::tuple& scalars, const py::tuple& codes, uintptr_t grad_logprobs,
                              uintptr_t grad_entropy) {
  PolicyArgs a;
  a.rows = rows;
  a.logprobs = array(arrays[0]), a.old_logprobs = array(arrays[1]), a.advantages = array(arrays[2]), a.mask = array(arrays[3]);
  a.rollout_logprobs = array(arrays[4]), a.ref_logprobs = array(arrays[5]), a.entropy = array(arrays[6]);
  double* const fields[] = {&a.clip_low, &a.clip_high, &a.dual_clip, &a.ratio_clamp, &a.delta, &a.tau_pos, &a.tau_neg,
                            &a.correction_low, &a.correction_high, &a.kl_coef, &a.entropy_coef, &a.denominator};
  for (size_t i = 0; i < std::size(fields); ++i) *fields[i] = scalars[i].cast<double>();
  a.kind = static_cast<PolicyKind>(codes[0].cast<int>());
  a.correction = static_cast<Correction>(codes[1].cast<int>());
  a.correction_level = static_cast<CorrectionLevel>(codes[2].cast<int>());
  a.kl_kind = codes[3].cast<int>();
  a.reduction = static_cast<Reduction>(codes[4].cast<int>());
  a.grad_logprobs = pointer(grad_logprobs);
  a.grad_entropy = pointer(grad_entropy);
  return a;
}

inline ValueArgs value_args(const Rows& rows, const py::object& values, const py::object& old_values, const py::object& returns,
                            const py::object& mask, double clip, int reduction, double denominator, uintptr_t grad_values) {
  ValueArgs a;
  a.rows = rows;
  a.values = array(values), a.old_values = array(old_values), a.returns = array(returns), a.mask = array(mask);
  a.clip = clip;
  a.reduction = static_cast<Reduction>(reduction);
  a.denominator = denominator;
  a.grad_values = pointer(grad_values);
  return a;
}

}  // namespace fastrlhf
