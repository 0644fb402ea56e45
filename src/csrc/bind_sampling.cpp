#include <stdexcept>
#include <string>

#include "bind.h"
#include "sampling/cpu.h"

namespace fastrlhf {

void bind_sampling(py::module_& m) {
  // scalars: temperature, top_k, top_p, min_p, seed; per_row: addresses of the same, (rows), or 0
  m.def("sample", [](const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& scalars, const py::tuple& per_row,
                     uintptr_t tokens, uintptr_t logprobs, uintptr_t thresholds, uintptr_t kept_counts, int threads) {
    SampleArgs a;
    a.logits = matrix(logits);
    a.rows = rows, a.vocab = vocab;
    a.temperature = scalars[0].cast<double>();
    a.top_k = scalars[1].cast<int64_t>();
    a.top_p = scalars[2].cast<double>();
    a.min_p = scalars[3].cast<double>();
    a.seed = scalars[4].cast<int64_t>();
    a.temperatures = pointer<const double>(per_row[0].cast<uintptr_t>());
    a.top_ks = pointer<const int64_t>(per_row[1].cast<uintptr_t>());
    a.top_ps = pointer<const double>(per_row[2].cast<uintptr_t>());
    a.min_ps = pointer<const double>(per_row[3].cast<uintptr_t>());
    a.seeds = pointer<const int64_t>(per_row[4].cast<uintptr_t>());
    a.tokens = pointer<int64_t>(tokens);
    a.logprobs = pointer(logprobs);
    a.thresholds = pointer(thresholds);
    a.kept_counts = pointer<int64_t>(kept_counts);
    a.threads = threads;
    {
      py::gil_scoped_release release;
      sample(a);
    }
    for (int64_t r = 0; r < rows; ++r)
      if (a.tokens[r] < 0)
        throw std::invalid_argument("logits: row " + std::to_string(r) + " has no largest finite logit to sample from");
  });
  m.def("kept_indices", [](const py::tuple& logits, int64_t rows, int64_t vocab, uintptr_t thresholds, uintptr_t indptr,
                           uintptr_t indices, int threads) {
    KeptArgs a;
    a.logits = matrix(logits);
    a.rows = rows, a.vocab = vocab;
    a.thresholds = pointer<const void>(thresholds);
    a.indptr = pointer<const int64_t>(indptr);
    a.indices = pointer<int64_t>(indices);
    a.threads = threads;
    py::gil_scoped_release release;
    kept_indices(a);
  });
}

}  // namespace fastrlhf
