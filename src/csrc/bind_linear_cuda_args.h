// The arguments of the Hopper kernels of linear_logprobs as Python hands them over.
#pragma once

#include "bind_logprobs_args.h"
#include "linear_logprobs/cuda_args.h"

namespace fastrlhf {

// hidden (rows, width), weight (vocab, width): (address, dtype, row stride in elements), bfloat16, every row at a multiple of 16 bytes.
//   For a strip of the vocabulary, the weight's first row is the strip's and vocab its columns.
// shape: (rows, vocab, width, address of the number of rows that count or 0, its dtype); the number lies on the device, int32 or int64
// labels: (address, dtype, labels_per_row = 1, vocab_start, vocab_total, ignore_index); vocab_start is the global id of column 0
// scaling: (temperature, address of temperatures (rows) float64 or 0, softcap or 0)
// bias: (address or 0, dtype), (vocab), float32, bfloat16 or float16
inline LinearLogprobsArgs linear_logprobs_args(const py::tuple& hidden, const py::tuple& weight, const py::tuple& shape, const py::tuple& labels,
                                               const py::tuple& scaling, const py::tuple& bias) {
  auto operand = [](const py::tuple& t, const char* name) {
    if (static_cast<DType>(t[1].cast<int>()) != DType::bf16) throw py::type_error(std::string(name) + ": expected bfloat16");
    Operand o{pointer<const void>(t[0].cast<uintptr_t>()), t[2].cast<int64_t>()};
    if (reinterpret_cast<uintptr_t>(o.data) % 16 != 0 || o.row_stride % 8 != 0)
      throw py::value_error(std::string(name) + ": expected rows at multiples of 16 bytes, got a row stride of " + std::to_string(o.row_stride) +
                            " elements from " + std::to_string(reinterpret_cast<uintptr_t>(o.data) % 16) + " bytes past one");
    return o;
  };
  LinearLogprobsArgs a;
  const int64_t rows = shape[0].cast<int64_t>(), vocab = shape[1].cast<int64_t>();
  a.forward = logprobs_args(py::make_tuple(0, 0, 1, 0, 0), rows, vocab, labels, scaling, py::make_tuple(0, 0, 0, 0, 0));
  if (a.forward.labels_per_row != 1) throw py::value_error("labels: expected one a row, got " + std::to_string(a.forward.labels_per_row));
  a.hidden = operand(hidden, "hidden");
  a.weight = operand(weight, "weight");
  a.width = shape[2].cast<int64_t>();
  a.row_count = pointer<const void>(shape[3].cast<uintptr_t>());
  a.row_count_dtype = static_cast<DType>(shape[4].cast<int>());
  a.bias = pointer<const void>(bias[0].cast<uintptr_t>());
  a.bias_dtype = static_cast<DType>(bias[1].cast<int>());
  if (rows < 0 || vocab < 1 || a.width < 1 || rows > INT32_MAX - 256 || vocab > INT32_MAX - 256 || a.width > INT32_MAX - 256)
    throw py::value_error("rows, vocab, width: expected each to fit in 31 bits, vocab and width at least 1, got " + std::to_string(rows) + ", " +
                          std::to_string(vocab) + ", " + std::to_string(a.width));
  return a;
}

// partials: address of float32 (linear_logprobs_parts(vocab), rows, 4): max, sum of e^u, sum of u e^u, label logit or -inf, with
//   u = (x - max) / T: what logprobs_combine merges with ranks = linear_logprobs_parts(vocab).
inline LinearLogprobsArgs linear_logprobs_partials_args(const py::tuple& hidden, const py::tuple& weight, const py::tuple& shape,
                                                        const py::tuple& labels, const py::tuple& scaling, const py::tuple& bias, uintptr_t partials) {
  LinearLogprobsArgs a = linear_logprobs_args(hidden, weight, shape, labels, scaling, bias);
  a.forward.partials = pointer(partials);
  return a;
}

// statistics: (0, entropy or 0, 0, max, log_sum), addresses of float32 (rows), of the whole vocabulary: as logprobs_backward takes them;
//   the entropy only where there is a grad_entropy
// grads: (grad_logprobs, grad_entropy, grad_lse), addresses of float32 (rows) or 0
// grad: (address, dtype, row stride in elements), (rows, vocab), bfloat16 or float32, every row at a multiple of 16 bytes: d loss / d (hidden
//   weight^T + bias). Every row is written: with zeros those that are ignored or do not count.
inline LinearLogprobsGradientArgs linear_logprobs_gradient_args(const py::tuple& hidden, const py::tuple& weight, const py::tuple& shape,
                                                                const py::tuple& labels, const py::tuple& scaling, const py::tuple& bias,
                                                                const py::tuple& statistics, const py::tuple& grads, const py::tuple& grad) {
  LinearLogprobsGradientArgs g;
  g.linear = linear_logprobs_args(hidden, weight, shape, labels, scaling, bias);
  logprobs_outputs(g.linear.forward, statistics, 0);
  g.grad_logprobs = pointer<const void>(grads[0].cast<uintptr_t>());
  g.grad_entropy = pointer<const void>(grads[1].cast<uintptr_t>());
  g.grad_lse = pointer<const void>(grads[2].cast<uintptr_t>());
  g.grad = pointer(grad[0].cast<uintptr_t>());
  g.grad_dtype = static_cast<DType>(grad[1].cast<int>());
  g.grad_stride = grad[2].cast<int64_t>();
  if (g.grad_dtype != DType::bf16 && g.grad_dtype != DType::f32) throw py::type_error("grad: expected bfloat16 or float32");
  if (reinterpret_cast<uintptr_t>(g.grad) % 16 != 0 || g.grad_stride * element_size(g.grad_dtype) % 16 != 0)
    throw py::value_error("grad: expected rows at multiples of 16 bytes, got a row stride of " + std::to_string(g.grad_stride) + " elements");
  return g;
}

// Of the forward that keeps exponentials.
// exponentials: (address, dtype, row stride in elements), (rows, vocab), bfloat16, every row at a multiple of 16 bytes: e^((x - reference) / T),
//   and in their place, after linear_logprobs_exponentials_to_gradient, d loss / d (hidden weight^T + bias)
// references: address of float32 (ceil(vocab / 256), rows)
inline LinearLogprobsExponentialsArgs linear_logprobs_exponentials_args(LinearLogprobsArgs linear, const py::tuple& exponentials, uintptr_t references) {
  LinearLogprobsExponentialsArgs e;
  e.linear = linear;
  e.exponentials = pointer(exponentials[0].cast<uintptr_t>());
  e.stride = exponentials[2].cast<int64_t>();
  e.references = pointer<float>(references);
  if (static_cast<DType>(exponentials[1].cast<int>()) != DType::bf16) throw py::type_error("exponentials: expected bfloat16");
  if (reinterpret_cast<uintptr_t>(e.exponentials) % 16 != 0 || e.stride % 8 != 0)
    throw py::value_error("exponentials: expected rows at multiples of 16 bytes, got a row stride of " + std::to_string(e.stride) + " elements");
  return e;
}

// statistics: (logprobs, entropy or 0, 0, max, log_sum), addresses of float32 (rows), as logprobs_combine wrote them
// shape, labels, scaling: as the forward had them; grads: as above
inline ExponentialsToGradientArgs exponentials_to_gradient_args(const py::tuple& shape, const py::tuple& labels, const py::tuple& scaling,
                                                                const py::tuple& statistics, const py::tuple& grads, const py::tuple& exponentials,
                                                                uintptr_t references) {
  const py::tuple none = py::make_tuple(0, static_cast<int>(DType::bf16), 0);
  LinearLogprobsArgs linear = linear_logprobs_args(none, none, shape, labels, scaling, py::make_tuple(0, 0));
  logprobs_outputs(linear.forward, statistics, 0);
  ExponentialsToGradientArgs g;
  g.of = linear_logprobs_exponentials_args(linear, exponentials, references);
  g.grad_logprobs = pointer<const void>(grads[0].cast<uintptr_t>());
  g.grad_entropy = pointer<const void>(grads[1].cast<uintptr_t>());
  g.grad_lse = pointer<const void>(grads[2].cast<uintptr_t>());
  return g;
}

}  // namespace fastrlhf
