#include "bind_linear_args.h"
#include "linear_logprobs/cpu.h"
#include "threads.h"

namespace fastrlhf {
namespace {

LinearArgs checked(LinearArgs a, const py::tuple& labels, const py::tuple& kept, int threads) {
  a.row.threads = worthwhile(threads, a.row.rows * a.row.vocab * (a.width / 16 + 1));
  check_labels(a.row, labels[4].cast<int64_t>());
  check_temperatures(a.row);
  check_kept(a.row, kept[3].cast<int64_t>(), kept[4].cast<int64_t>());
  return a;
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("linear_logprobs_forward", [](const py::tuple& hidden, const py::tuple& weight, const py::tuple& bias, const py::tuple& sizes,
                                      const py::tuple& labels, const py::tuple& scaling, const py::tuple& kept, const py::tuple& results,
                                      uintptr_t partials, uintptr_t logits, int64_t workspace_bytes, int threads) {
    LinearArgs a = checked(linear_args(hidden, weight, bias, sizes, labels, scaling, kept, logits, workspace_bytes), labels, kept, threads);
    logprobs_outputs(a.row, results, partials);
    py::gil_scoped_release release;
    linear_logprobs_forward(a);
  });
  // grads: of logprobs, entropy, lse; outputs: (grad_hidden, grad_weight, its dtype, grad_bias): addresses or 0
  m.def("linear_logprobs_backward", [](const py::tuple& hidden, const py::tuple& weight, const py::tuple& bias, const py::tuple& sizes,
                                       const py::tuple& labels, const py::tuple& scaling, const py::tuple& kept, const py::tuple& results,
                                       const py::tuple& grads, const py::tuple& outputs, bool accumulate, bool narrow_sums, bool rounded,
                                       uintptr_t logits, int64_t workspace_bytes, int threads) {
    LinearBackwardArgs b;
    b.forward = checked(linear_args(hidden, weight, bias, sizes, labels, scaling, kept, logits, workspace_bytes), labels, kept, threads);
    logprobs_outputs(b.forward.row, results, 0);
    b.grad_logprobs = pointer(grads[0].cast<uintptr_t>());
    b.grad_entropy = pointer(grads[1].cast<uintptr_t>());
    b.grad_lse = pointer(grads[2].cast<uintptr_t>());
    b.grad_hidden = pointer(outputs[0].cast<uintptr_t>());
    b.grad_weight = pointer(outputs[1].cast<uintptr_t>());
    b.grad_weight_dtype = static_cast<DType>(outputs[2].cast<int>());
    b.grad_bias = pointer(outputs[3].cast<uintptr_t>());
    b.accumulate = accumulate;
    b.narrow_sums = narrow_sums;
    b.rounded = rounded;
    py::gil_scoped_release release;
    linear_logprobs_backward(b);
  });
  m.def("linear_logprobs_stored_lanes", [](bool f64) {
    int64_t lanes = 0;
    linear_logprobs_stored_lanes({f64, &lanes});
    return lanes;
  }, "Rows side by side in that room.");
  m.def("linear_logprobs_stored_size", &stored_size, "Elements of the room for the logits of so many rows and columns.");
}

}  // namespace fastrlhf
