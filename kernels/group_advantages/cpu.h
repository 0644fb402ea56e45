#pragma once

#include "csrc/tensor.h"

namespace fastrlhf {

enum class GroupKind : int { grpo = 0, dr_grpo = 1, rloo = 2, reinforce_pp = 3, opo = 4 };

struct GroupArgs {
  int64_t count = 0;
  const double* scores = nullptr;     // (B)
  const int64_t* group_ids = nullptr; // (B), any values in any order
  const double* lengths = nullptr;    // (B), opo
  GroupKind kind = GroupKind::grpo;
  double eps = 1e-6;
  bool unbiased = true;
  double* advantages = nullptr;       // (B)
};

void group_advantages(const GroupArgs& a);

}  // namespace fastrlhf
