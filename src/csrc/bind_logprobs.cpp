#include "bind.h"
#include "logprobs/cpu.h"

namespace fastrlhf {
namespace {

// (labels, dtype, labels_per_row, vocab_start, vocab_total, ignore_index)
void read_labels(LogprobsArgs& a, const py::tuple& t) {
  a.labels = pointer(t[0].cast<uintptr_t>());
  a.label_dtype = static_cast<DType>(t[1].cast<int>());
  a.labels_per_row = t[2].cast<int64_t>();
  a.vocab_start = t[3].cast<int64_t>();
  a.ignore_index = t[5].cast<int64_t>();
  check_labels(a, t[4].cast<int64_t>());
}

// (temperature, address of temperatures or 0, softcap)
void read_scaling(LogprobsArgs& a, const py::tuple& t) {
  a.temperature = t[0].cast<double>();
  a.temperatures = pointer<const double>(t[1].cast<uintptr_t>());
  a.softcap = t[2].cast<double>();
  check_temperatures(a);
}

// (kept mask, indptr, indices, number of indices, vocab_total): addresses or 0
void read_kept(LogprobsArgs& a, const py::tuple& t) {
  a.kept_mask = pointer<const uint8_t>(t[0].cast<uintptr_t>());
  a.kept_indptr = pointer<const int64_t>(t[1].cast<uintptr_t>());
  a.kept_indices = pointer<const int64_t>(t[2].cast<uintptr_t>());
  check_kept(a, t[3].cast<int64_t>(), t[4].cast<int64_t>());
}

LogprobsArgs read(const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& labels, const py::tuple& scaling,
                  const py::tuple& kept, int threads) {
  LogprobsArgs a;
  a.logits = matrix(logits);
  a.rows = rows;
  a.vocab = vocab;
  a.threads = threads;
  read_labels(a, labels);
  read_scaling(a, scaling);
  read_kept(a, kept);
  return a;
}

// (logprobs, entropies, lse, max, log_sum): addresses or 0
void read_results(LogprobsArgs& a, const py::tuple& t) {
  a.logprobs = pointer(t[0].cast<uintptr_t>());
  a.entropies = pointer(t[1].cast<uintptr_t>());
  a.lse = pointer(t[2].cast<uintptr_t>());
  a.max = pointer(t[3].cast<uintptr_t>());
  a.log_sum = pointer(t[4].cast<uintptr_t>());
}

}  // namespace

void bind_logprobs(py::module_& m) {
  m.def("logprobs_forward", [](const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& labels,
                               const py::tuple& scaling, const py::tuple& kept, const py::tuple& results,
                               uintptr_t partials, int threads) {
    LogprobsArgs a = read(logits, rows, vocab, labels, scaling, kept, threads);
    read_results(a, results);
    a.partials = pointer(partials);
    a.partial = partials != 0;
    a.entropy = a.entropies || a.partial;
    py::gil_scoped_release release;
    logprobs_forward(a);
  });
  m.def("logprobs_combine", [](const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& labels,
                               const py::tuple& scaling, const py::tuple& results, uintptr_t partials, int64_t ranks, int) {
    LogprobsCombineArgs c;
    c.forward = read(logits, rows, vocab, labels, scaling, py::make_tuple(0, 0, 0, 0, 0), 1);
    read_results(c.forward, results);
    c.partials = pointer(partials);
    c.ranks = ranks;
    py::gil_scoped_release release;
    logprobs_combine(c);
  });
  m.def("logprobs_backward", [](const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& labels,
                                const py::tuple& scaling, const py::tuple& kept, const py::tuple& results,
                                uintptr_t grad_logprobs, uintptr_t grad_entropy, uintptr_t grad_lse,
                                const py::tuple& grad, int threads) {
    LogprobsBackwardArgs b;
    b.forward = read(logits, rows, vocab, labels, scaling, kept, threads);
    read_results(b.forward, results);
    b.grad_logprobs = pointer(grad_logprobs);
    b.grad_entropy = pointer(grad_entropy);
    b.grad_lse = pointer(grad_lse);
    b.grad = matrix(grad);
    py::gil_scoped_release release;
    logprobs_backward(b);
  });
}

}  // namespace fastrlhf
