// The arguments of the linear_logprobs kernels as Python hands them over.
#pragma once

#include "bind_logprobs_args.h"
#include "linear_logprobs/args.h"

namespace fastrlhf {

// sizes: (rows, vocab, width, compute dtype); bias: (address or 0, dtype); logits: room for them, or 0
inline LinearArgs linear_args(const py::tuple& hidden, const py::tuple& weight, const py::tuple& bias, const py::tuple& sizes,
                              const py::tuple& labels, const py::tuple& scaling, const py::tuple& kept, uintptr_t logits, int64_t workspace_bytes) {
  LinearArgs a;
  const auto dtype = sizes[3];
  a.row = logprobs_args(py::make_tuple(0, dtype, 1, 0, 0), sizes[0].cast<int64_t>(), sizes[1].cast<int64_t>(), labels, scaling, kept);
  a.hidden = matrix(hidden);
  a.weight = matrix(weight);
  a.width = sizes[2].cast<int64_t>();
  a.bias = pointer(bias[0].cast<uintptr_t>());
  a.bias_dtype = static_cast<DType>(bias[1].cast<int>());
  a.workspace_bytes = workspace_bytes;
  a.logits = pointer(logits);
  return a;
}

}  // namespace fastrlhf
