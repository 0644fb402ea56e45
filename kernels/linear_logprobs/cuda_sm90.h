#pragma once

#include "linear_logprobs/cuda_args.h"
#include "csrc/cuda_launch.h"

namespace fastrlhf { namespace cuda {

// Hopper only. Both want every row of hidden, weight and grad at a multiple of 16 bytes.
// Each part's (max, sum, weighted sum, label logit) of each row into forward.partials, float32 (parts, rows, 4), for `logprobs_combine`
// to merge: VocabSplit(vocab) says how many parts there are. Rows that do not count are left alone.
int linear_logprobs_partials(const LinearLogprobsArgs& a, const Launch& launch);
// The gradient of the logits of these columns; hidden, weight and statistics as the forward had them.
int linear_logprobs_strip_gradient(const LinearLogprobsGradientArgs& g, const Launch& launch);

// As linear_logprobs_partials, keeping what it takes to make the gradient of these rows without multiplying again.
int linear_logprobs_exponentials(const LinearLogprobsExponentialsArgs& e, const Launch& launch);
int linear_logprobs_exponentials_to_gradient(const ExponentialsToGradientArgs& g, const Launch& launch);

}}  // namespace
