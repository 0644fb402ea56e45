#include "cpu.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace fastrlhf {
namespace {

void one_group(const GroupArgs& a, const int64_t* members, int64_t n) {
  double total = 0, weighted = 0, weights = 0;
  for (int64_t i = 0; i < n; ++i) total += a.scores[members[i]];
  const double mean = total / n;
  double m2 = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = a.scores[members[i]] - mean;
    m2 += d * d;
  }
  if (a.kind == GroupKind::opo)
    for (int64_t i = 0; i < n; ++i) {
      weighted += a.lengths[members[i]] * a.scores[members[i]];
      weights += a.lengths[members[i]];
    }
  for (int64_t i = 0; i < n; ++i) {
    const double s = a.scores[members[i]];
    double& out = a.advantages[members[i]];
    switch (a.kind) {
      case GroupKind::grpo:
        out = n == 1 ? s / (1 + a.eps) : m2 == 0 ? 0 : (s - mean) / (std::sqrt(m2 / (a.unbiased ? n - 1 : n)) + a.eps);
        break;
      case GroupKind::rloo: out = n == 1 ? s : (s - mean) * (static_cast<double>(n) / (n - 1)); break;
      case GroupKind::opo: out = s - (weights > 0 ? weighted / weights : 0); break;
      default: out = s - mean;
    }
  }
}

}  // namespace

void group_advantages(const GroupArgs& a) {
  std::vector<int64_t> order(a.count);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return a.group_ids[i] < a.group_ids[j]; });
  for (int64_t begin = 0, end; begin < a.count; begin = end) {
    for (end = begin + 1; end < a.count && a.group_ids[order[end]] == a.group_ids[order[begin]];) ++end;
    one_group(a, order.data() + begin, end - begin);
  }
}

}  // namespace fastrlhf
