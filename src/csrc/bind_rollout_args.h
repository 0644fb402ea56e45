// The arguments of the rollout kernels as Python hands them over, for either module.
#pragma once

#include "bind.h"
#include "gae/args.h"
#include "masked_stats/args.h"

namespace fastrlhf {

// shaping: (kl_coef, kl_kind, score_clip, kl_clip); outputs and lams: addresses or 0
inline RolloutArgs rollout_args(const Rows& rows, const py::object& rewards, const py::object& scores, const py::object& logprobs,
                                const py::object& ref_logprobs, const py::object& values, const py::object& mask, const py::object& bootstrap,
                                const py::tuple& shaping, double gamma, double lam, uintptr_t lams, int mask_mode, uintptr_t shaped,
                                uintptr_t kl, uintptr_t advantages, uintptr_t returns) {
  RolloutArgs a;
  a.rows = rows;
  a.rewards = array(rewards), a.scores = array(scores), a.logprobs = array(logprobs), a.ref_logprobs = array(ref_logprobs);
  a.values = array(values), a.mask = array(mask), a.bootstrap = array(bootstrap);
  a.kl_coef = shaping[0].cast<double>();
  a.kl_kind = shaping[1].cast<int>();
  a.score_clip = shaping[2].cast<double>();
  a.kl_clip = shaping[3].cast<double>();
  a.gamma = gamma, a.lam = lam;
  a.lams = pointer<const double>(lams);
  a.mask_mode = static_cast<MaskMode>(mask_mode);
  a.shaped = pointer(shaped), a.kl = pointer(kl), a.advantages = pointer(advantages), a.returns = pointer(returns);
  return a;
}

}  // namespace fastrlhf
