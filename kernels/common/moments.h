#pragma once

#include "host_device.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

// Masked count, mean and sum of squared deviations, merged pairwise (Chan et al. 1979): no sum of squares to cancel.
struct Moments {
  double n = 0, mean = 0, m2 = 0;

  // n elements of deviations that sum to `rest` and whose squares sum to `square`, about a point near their mean.
  FASTRLHF_HOST_DEVICE static Moments about(double n, double point, double rest, double square) {
    if (n == 0) return {};
    const double correction = rest / n;
    return {n, point + correction, square - n * correction * correction};
  }
  FASTRLHF_HOST_DEVICE void merge(const Moments& o) {
    if (o.n == 0) return;
    const double total = n + o.n, delta = o.mean - mean;
    mean += delta * (o.n / total);
    m2 += o.m2 + delta * delta * (n * o.n / total);
    n = total;
  }
};

}}}  // namespace
