// The arguments of the logprobs kernels as Python hands them over, for either module.
#pragma once

#include "bind.h"
#include "logprobs/args.h"

namespace fastrlhf {

// labels: (address, dtype, labels_per_row, vocab_start, vocab_total, ignore_index)
// scaling: (temperature, address of temperatures or 0, softcap)
// kept: (kept mask, indptr, indices, number of indices, vocab_total): addresses or 0
inline LogprobsArgs logprobs_args(const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& labels, const py::tuple& scaling,
                                  const py::tuple& kept) {
  LogprobsArgs a;
  a.logits = matrix(logits);
  a.rows = rows;
  a.vocab = vocab;
  a.labels = pointer(labels[0].cast<uintptr_t>());
  a.label_dtype = static_cast<DType>(labels[1].cast<int>());
  a.labels_per_row = labels[2].cast<int64_t>();
  a.vocab_start = labels[3].cast<int64_t>();
  a.ignore_index = labels[5].cast<int64_t>();
  a.temperature = scaling[0].cast<double>();
  a.temperatures = pointer<const double>(scaling[1].cast<uintptr_t>());
  a.softcap = scaling[2].cast<double>();
  a.kept_mask = pointer<const uint8_t>(kept[0].cast<uintptr_t>());
  a.kept_indptr = pointer<const int64_t>(kept[1].cast<uintptr_t>());
  a.kept_indices = pointer<const int64_t>(kept[2].cast<uintptr_t>());
  return a;
}

// (logprobs, entropy, lse, max, log_sum), partials: addresses or 0
inline void logprobs_outputs(LogprobsArgs& a, const py::tuple& t, uintptr_t partials) {
  a.logprobs = pointer(t[0].cast<uintptr_t>());
  a.entropies = pointer(t[1].cast<uintptr_t>());
  a.lse = pointer(t[2].cast<uintptr_t>());
  a.max = pointer(t[3].cast<uintptr_t>());
  a.log_sum = pointer(t[4].cast<uintptr_t>());
  a.partials = pointer(partials);
  a.partial = partials != 0;
  a.entropy = a.entropies || a.partial;
}

}  // namespace fastrlhf
