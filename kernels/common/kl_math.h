// The per-token KL estimators of d = logprobs - ref_logprobs and their slopes: Schulman 2020, "Approximating KL divergence".
#pragma once

#include "host_device.h"
#include "simd/simd.h"

namespace fastrlhf {

enum class KlKind : int { k1 = 0, abs = 1, k2 = 2, k3 = 3 };

namespace FASTRLHF_ISA { namespace {

template <class V>
FASTRLHF_HOST_DEVICE inline V absolute(V x) { return max(V::set(0) - x, x); }

template <class V>
FASTRLHF_HOST_DEVICE inline V kl_value(KlKind kind, V d) {
  switch (kind) {
    case KlKind::k1: return d;
    case KlKind::abs: return absolute(d);
    case KlKind::k2: return d * d * V::set(0.5);
    default: return expm1_minus_x(V::set(0) - d);  // e^-d - 1 + d
  }
}

template <class V>
FASTRLHF_HOST_DEVICE inline V kl_slope(KlKind kind, V d) {
  const V zero = V::set(0), one = V::set(1);
  switch (kind) {
    case KlKind::k1: return one;
    case KlKind::abs: return select(d > zero, one, select(d < zero, zero - one, zero));
    case KlKind::k2: return d;
    default: {  // 1 - e^-d
      const V half = V::set(0.5), large = one - exp(zero - d);
      return select(d < half, select(d > zero - half, d - expm1_minus_x(zero - d), large), large);
    }
  }
}

// The value and its derivative under symmetric clamps of d and of the result (infinite: none). With straight_through
// the derivative is k2's: that of d, through the clamp of d.
template <class V>
FASTRLHF_HOST_DEVICE inline void kl_clamped(KlKind kind, V d, V input_bound, V output_bound, bool straight_through, V& value, V& slope) {
  const V zero = V::set(0);
  const V x = max(zero - input_bound, min(input_bound, d));
  const V raw = kl_value(kind, x);
  value = max(zero - output_bound, min(output_bound, raw));
  if (straight_through) {
    slope = x;
  } else {
    slope = select(absolute(raw) <= output_bound, kl_slope(kind, x), zero);
  }
  slope = select(absolute(d) <= input_bound, slope, zero);
}

}}}  // namespace
