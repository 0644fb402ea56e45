// How token losses become one number: the weight of row b's tokens is row_factor * share. Rows without a counted token are
// not sequences. Neither depends on the losses, so the gradient comes out of the same pass.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/reduction_kind.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

struct Totals { double tokens = 0, sequences = 0; };

// What a row knows by itself.
FASTRLHF_HOST_DEVICE inline double row_factor(Reduction reduction, double row_tokens) {
  if (row_tokens == 0) return 0;
  return reduction == Reduction::seq_mean_token_mean ? 1 / row_tokens : 1;
}

// What all rows together, or a given denominator (NaN: none), say.
FASTRLHF_HOST_DEVICE inline double share_of(Reduction reduction, double denominator, const Totals& totals, int64_t length) {
  double over = denominator;
  if (denominator != denominator) {
    switch (reduction) {
      case Reduction::token_mean: over = totals.tokens; break;
      case Reduction::token_sum: over = 1; break;
      case Reduction::seq_mean_token_mean:
      case Reduction::seq_mean_token_sum: over = totals.sequences; break;
      case Reduction::seq_mean_token_sum_norm: over = totals.sequences * static_cast<double>(length); break;
    }
  }
  return over != 0 ? 1 / over : 0;
}

}}}  // namespace
