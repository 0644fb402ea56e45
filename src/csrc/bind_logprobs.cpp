#include "bind_logprobs_args.h"
#include "logprobs/cpu.h"

namespace fastrlhf {
namespace {

LogprobsArgs checked(const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& labels, const py::tuple& scaling,
                     const py::tuple& kept, int threads) {
  LogprobsArgs a = logprobs_args(logits, rows, vocab, labels, scaling, kept);
  a.threads = threads;
  check_labels(a, labels[4].cast<int64_t>());
  check_temperatures(a);
  check_kept(a, kept[3].cast<int64_t>(), kept[4].cast<int64_t>());
  return a;
}

}  // namespace

void bind_logprobs(py::module_& m) {
  m.def("logprobs_forward", [](const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& labels,
                               const py::tuple& scaling, const py::tuple& kept, const py::tuple& results,
                               uintptr_t partials, int threads) {
    LogprobsArgs a = checked(logits, rows, vocab, labels, scaling, kept, threads);
    logprobs_outputs(a, results, partials);
    py::gil_scoped_release release;
    logprobs_forward(a);
  });
  m.def("logprobs_combine", [](const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& labels,
                               const py::tuple& scaling, const py::tuple& results, uintptr_t partials, int64_t ranks, int) {
    LogprobsCombineArgs c;
    c.forward = checked(logits, rows, vocab, labels, scaling, py::make_tuple(0, 0, 0, 0, 0), 1);
    logprobs_outputs(c.forward, results, 0);
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
    b.forward = checked(logits, rows, vocab, labels, scaling, kept, threads);
    logprobs_outputs(b.forward, results, 0);
    b.grad_logprobs = pointer(grad_logprobs);
    b.grad_entropy = pointer(grad_entropy);
    b.grad_lse = pointer(grad_lse);
    b.grad = matrix(grad);
    py::gil_scoped_release release;
    logprobs_backward(b);
  });
}

}  // namespace fastrlhf
