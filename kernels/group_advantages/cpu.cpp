#include "cpu.h"

#include "common/row_value.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace fastrlhf {
namespace {

struct Batch { std::vector<double> scores, lengths, advantages; };

void one_group(const GroupArgs& a, Batch& batch, const int64_t* members, int64_t n) {
  double total = 0, weighted = 0, weights = 0;
  for (int64_t i = 0; i < n; ++i) total += batch.scores[members[i]];
  const double mean = total / n;
  double m2 = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double d = batch.scores[members[i]] - mean;
    m2 += d * d;
  }
  if (a.kind == GroupKind::opo)
    for (int64_t i = 0; i < n; ++i) {
      weighted += batch.lengths[members[i]] * batch.scores[members[i]];
      weights += batch.lengths[members[i]];
    }
  for (int64_t i = 0; i < n; ++i) {
    const double s = batch.scores[members[i]];
    double& out = batch.advantages[members[i]];
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
  Batch batch;
  batch.scores.resize(a.count), batch.lengths.resize(a.count), batch.advantages.resize(a.count);
  std::vector<int64_t> order(a.count), ids(a.count);
  for (int64_t i = 0; i < a.count; ++i) {
    order[i] = i;
    ids[i] = row_integer(a.group_ids, i);
    batch.scores[i] = row_value(a.scores, i);
    if (a.lengths) batch.lengths[i] = row_value(a.lengths, i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return ids[i] < ids[j]; });
  for (int64_t begin = 0, end; begin < a.count; begin = end) {
    for (end = begin + 1; end < a.count && ids[order[end]] == ids[order[begin]];) ++end;
    one_group(a, batch, order.data() + begin, end - begin);
  }
  for (int64_t i = 0; i < a.count; ++i) {
    if (a.f64) static_cast<double*>(a.advantages)[i] = batch.advantages[i];
    else static_cast<float*>(a.advantages)[i] = static_cast<float>(batch.advantages[i]);
  }
}

}  // namespace fastrlhf
