// One token's clipped value loss, for any vector of tokens.
#pragma once

#include "common/simd/simd.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

// max((V - R)^2, (V_old + clamp(V - V_old) - R)^2), its slope / 2, and 1 where the clipped error is the larger: there the slope
// is 0. Inside the clamp the two are one number, but for rounding.
template <class V>
FASTRLHF_HOST_DEVICE inline void value_error(V value, V old, V target, V bound, V& square, V& slope, V& clipped) {
  const V zero = V::set(0), one = V::set(1);
  const V error = value - target, moved = old + max(zero - bound, min(bound, value - old)) - target;
  const V plain = error * error, held = moved * moved;
  const V excess = select(max(value - old, old - value) > bound, held - plain, zero);
  const auto use_held = excess > zero;
  square = select(use_held, held, plain);
  slope = select(use_held, zero, error);
  clipped = select(use_held, one, zero);
}

}}}  // namespace
