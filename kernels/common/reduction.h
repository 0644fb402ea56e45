// How token losses become one number: the weight of row b's tokens. Known before the losses are, so the gradient comes
// out of the same pass. Rows without a counted token are not sequences.
#pragma once

#include <cstdint>

#include "common/reduction_kind.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

struct Totals { double tokens = 0, sequences = 0; };

inline double row_weight(Reduction reduction, double denominator, const Totals& totals, double row_tokens, int64_t length) {
  const bool given = denominator == denominator;
  double over = 1;
  switch (reduction) {
    case Reduction::token_mean: over = given ? denominator : totals.tokens; break;
    case Reduction::token_sum: over = given ? denominator : 1; break;
    case Reduction::seq_mean_token_mean: over = (given ? denominator : totals.sequences) * row_tokens; break;
    case Reduction::seq_mean_token_sum: over = given ? denominator : totals.sequences; break;
    case Reduction::seq_mean_token_sum_norm: over = given ? denominator : totals.sequences * static_cast<double>(length); break;
  }
  return over != 0 && row_tokens != 0 ? 1 / over : 0;
}

}}}  // namespace
