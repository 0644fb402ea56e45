// What only the values of an input tell. Each throws before anything is written: IndexError for a label or an index out
// of range, ValueError for the rest, with the name of the argument, the first offending position and what stands there.
#pragma once

#include "logprobs/args.h"
#include "tensor.h"

namespace fastrlhf {

void check_labels(const LogprobsArgs& a, int64_t vocab_total);
void check_temperatures(const LogprobsArgs& a);
void check_kept(const LogprobsArgs& a, int64_t indices, int64_t vocab_total);
void check_cu_seqlens(const Rows& rows, int64_t total);
void check_unit_interval(const double* x, int64_t n, const char* name);

}  // namespace fastrlhf
