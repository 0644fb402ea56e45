// y_t = d_t + c_t y_{t+1}, from the end: the associative scan under GAE and discounted returns. Elements compose as
// (c, d) after (c', d') = (c c', d + c d'), so a vector's worth is scanned in log2(W) steps and only one multiply-add
// a vector hangs on the one to its right.
#pragma once

#include "simd/simd.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

// (c, d) after the element to its right, (c', d').
template <class V>
FASTRLHF_HOST_DEVICE inline void compose(V& c, V& d, V right_c, V right_d) {
  d = fma(c, right_d, d);
  c = c * right_c;
}

#if !defined(FASTRLHF_GPU)
template <int k, class V>
inline void compose_right(V& c, V& d) {
  if constexpr (k < V::W) {
    compose(c, d, V::template down<k>(c, V::set(1)), V::template down<k>(d, V::set(0)));
    compose_right<2 * k>(c, d);
  }
}
#endif

}}}  // namespace
