// A row's softmax statistics m, s = sum e^u, t = sum u e^u with u = (x - m) / T: moved to another reference point, and what
// they say of the row.
#pragma once

#include <cmath>

#include "host_device.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

// To a reference point that lies `shift` = (old - new) / T away; factor = e^shift. In any unit of u, if both are in it.
template <class T>
FASTRLHF_HOST_DEVICE inline void move_sums(T shift, T factor, T& sum, T& weighted) {
  weighted = factor == 0 ? T(0) : (weighted + sum * shift) * factor;
  sum *= factor;
}

// The sum is at least 1, its largest term, but for rounding: no log-probability above 0, no entropy below.
FASTRLHF_HOST_DEVICE inline double log_of_sum(double sum) { return sum > 0 && sum < 1 ? 0 : std::log(sum == 0 ? NAN : sum); }

FASTRLHF_HOST_DEVICE inline double logprob_of(double label_logit, double max, double scale, double log_sum) {
  return (label_logit - max) * scale - log_sum;
}

FASTRLHF_HOST_DEVICE inline double entropy_of(double log_sum, double weighted, double sum) {
  const double entropy = log_sum - weighted / sum;
  return entropy < 0 ? 0 : entropy;
}

// d z / dx of z = cap tanh(x / cap), which is 1 - (z / cap)^2: the factor that goes to 0 with |x| is exact. Of vectors too.
template <class V>
FASTRLHF_HOST_DEVICE inline V soft_cap_slope(V z, V cap, V over_square) { return (cap - z) * (cap + z) * over_square; }

// The gradient of a row: dx_i = e^u (constant + slope u), and at each label + g_k / T.
struct RowGradient { double constant, slope; };

FASTRLHF_HOST_DEVICE inline RowGradient row_gradient(double label_total, double g_entropy, double g_lse, double entropy, double log_sum,
                                                     double scale) {
  const double inverse = std::exp(-log_sum) * scale;
  return {(g_lse - label_total - g_entropy * (entropy - log_sum)) * inverse, -g_entropy * inverse};
}

}}}  // namespace
