#pragma once

#include "csrc/tensor.h"

namespace fastrlhf {

enum class GroupKind : int { grpo = 0, dr_grpo = 1, rloo = 2, reinforce_pp = 3, opo = 4 };

struct GroupArgs {
  int64_t count = 0;
  bool f64 = false;                   // write double instead of float
  Array scores, group_ids, lengths;   // (B); ids: any values in any order; lengths: opo
  GroupKind kind = GroupKind::grpo;
  double eps = 1e-6;
  bool unbiased = true;
  void* advantages = nullptr;         // (B)
};

void group_advantages(const GroupArgs& a);

}  // namespace fastrlhf
