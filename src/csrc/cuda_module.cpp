// The CUDA object. Its entries take what those of `_cpu` take, a stream in place of threads; nothing waits for the device.
#if defined(FASTRLHF_CUDA_HOST)
#include "shim.h"
#else
#include <cuda_runtime_api.h>
#endif

#include <pybind11/pybind11.h>

#include <string>

#include "bind_linear_cuda_args.h"
#include "bind_logprobs_args.h"
#include "bind_rollout_args.h"
#include "bind_losses_args.h"
#include "gae/cuda.h"
#include "linear_logprobs/cuda_sm90.h"
#include "logprobs/cuda.h"
#include "logprobs/one_read.h"
#include "masked_stats/cuda.h"
#include "policy_loss/cuda.h"
#include "refit/bind_cuda.h"
#include "value_loss/cuda.h"

#define FASTRLHF_TEXT_(x) #x
#define FASTRLHF_TEXT(x) FASTRLHF_TEXT_(x)

namespace fastrlhf {
namespace {

void check(int status) {
  if (status == 0) return;
  if (status == no_workspace) throw std::invalid_argument("workspace: too small for this launch");
#if defined(FASTRLHF_CUDA_HOST)
  throw std::runtime_error("launch failed");
#else
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(static_cast<cudaError_t>(status)));
#endif
}

Launch on(uintptr_t stream) {
  Launch l;
  l.stream = pointer(stream);
  return l;
}
Launch on(uintptr_t stream, uintptr_t workspace, int64_t size, uintptr_t counter) {
  Launch l = on(stream);
  l.workspace = pointer<double>(workspace);
  l.workspace_size = size;
  l.counter = pointer<int>(counter);
  return l;
}

cuda::LossResults results(uintptr_t loss, uintptr_t stats, uintptr_t share, uintptr_t denominator) {
  cuda::LossResults r;
  r.loss = pointer<float>(loss), r.stats = pointer<float>(stats), r.share = pointer<float>(share);
  r.denominator = pointer<const double>(denominator);
  return r;
}

void bind(py::module_& m) {
  m.def("logprobs_forward", [](const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& labels, const py::tuple& scaling,
                               const py::tuple& kept, const py::tuple& outputs, uintptr_t partials, uintptr_t stream) {
    LogprobsArgs a = logprobs_args(logits, rows, vocab, labels, scaling, kept);
    logprobs_outputs(a, outputs, partials);
    check(cuda::logprobs_forward(a, on(stream)));
  });
  m.def("logprobs_combine", [](const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& labels, const py::tuple& scaling,
                               const py::tuple& outputs, uintptr_t partials, int64_t ranks, uintptr_t stream) {
    LogprobsCombineArgs c;
    c.forward = logprobs_args(logits, rows, vocab, labels, scaling, py::make_tuple(0, 0, 0, 0, 0));
    logprobs_outputs(c.forward, outputs, 0);
    c.partials = pointer(partials);
    c.ranks = ranks;
    check(cuda::logprobs_combine(c, on(stream)));
  });
  m.def("logprobs_backward", [](const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& labels, const py::tuple& scaling,
                                const py::tuple& kept, const py::tuple& outputs, uintptr_t grad_logprobs, uintptr_t grad_entropy,
                                uintptr_t grad_lse, const py::tuple& grad, uintptr_t stream) {
    LogprobsBackwardArgs b;
    b.forward = logprobs_args(logits, rows, vocab, labels, scaling, kept);
    logprobs_outputs(b.forward, outputs, 0);
    b.grad_logprobs = pointer(grad_logprobs), b.grad_entropy = pointer(grad_entropy), b.grad_lse = pointer(grad_lse);
    b.grad = matrix(grad);
    check(cuda::logprobs_backward(b, on(stream)));
  });
  m.def("one_read_fits", [](const py::tuple& logits, int64_t vocab, int major) { return cuda::one_read_fits(matrix(logits), vocab, major); });
  m.def("one_read", [](const py::tuple& logits, int64_t rows, int64_t vocab, const py::tuple& labels, const py::tuple& scaling,
                       const py::tuple& outputs, const py::tuple& shape, const py::tuple& arrays, const py::tuple& scalars,
                       const py::tuple& codes, bool entropy_term, uintptr_t share, const py::tuple& grad, uintptr_t stream) {
    cuda::OneReadArgs a;
    a.logprobs = logprobs_args(logits, rows, vocab, labels, scaling, py::make_tuple(0, 0, 0, 0, 0));
    logprobs_outputs(a.logprobs, outputs, 0);
    a.policy = policy_args(device_rows(shape), arrays, scalars, codes, 0, 0);
    a.entropy_term = entropy_term;
    a.share = pointer<const float>(share);
    a.grad = matrix(grad);
    check(cuda::one_read(a, on(stream)));
  });
  m.def("rescale", [](uintptr_t x, uintptr_t factor, int64_t count, int dtype, uintptr_t stream) {
    check(cuda::rescale(pointer(x), pointer<const float>(factor), count, static_cast<DType>(dtype), on(stream)));
  });
  m.def("rollout", [](const py::tuple& shape, const py::object& rewards, const py::object& scores, const py::object& logprobs,
                      const py::object& ref_logprobs, const py::object& values, const py::object& mask, const py::object& bootstrap,
                      const py::tuple& shaping, double gamma, double lam, uintptr_t lams, int mask_mode, uintptr_t shaped, uintptr_t kl,
                      uintptr_t advantages, uintptr_t returns, uintptr_t stream) {
    const RolloutArgs a = rollout_args(device_rows(shape), rewards, scores, logprobs, ref_logprobs, values, mask, bootstrap, shaping, gamma, lam, lams,
                                       mask_mode, shaped, kl, advantages, returns);
    check(cuda::rollout(a, on(stream)));
  });
  m.def("moments", [](const py::tuple& shape, const py::object& x, const py::object& mask, uintptr_t out, uintptr_t variance, bool unbiased,
                      uintptr_t workspace, int64_t size, uintptr_t counter, uintptr_t stream) {
    MomentsArgs a;
    a.rows = device_rows(shape);
    a.x = array(x), a.mask = array(mask);
    check(cuda::masked_moments(a, pointer<double>(out), pointer<float>(variance), unbiased, on(stream, workspace, size, counter)));
  });
  m.def("row_sums", [](const py::tuple& shape, const py::object& x, const py::object& mask, bool average, uintptr_t sums, uintptr_t counts,
                       uintptr_t workspace, int64_t size, uintptr_t counter, uintptr_t stream) {
    RowSumsArgs a;
    a.rows = device_rows(shape);
    a.x = array(x), a.mask = array(mask);
    a.average = average;
    a.sums = pointer(sums), a.counts = pointer(counts);
    check(cuda::row_sums(a, on(stream, workspace, size, counter)));
  });
  m.def("standardize", [](const py::tuple& shape, const py::object& x, const py::object& mask, uintptr_t moments, bool shift_mean, bool unbiased,
                          double eps, uintptr_t out, uintptr_t stream) {
    StandardizeArgs a;
    a.rows = device_rows(shape);
    a.x = array(x), a.mask = array(mask);
    a.out = pointer(out);
    check(cuda::standardize(a, pointer<const double>(moments), shift_mean, unbiased, eps, on(stream)));
  });
  m.def("policy_loss", [](const py::tuple& shape, const py::tuple& arrays, const py::tuple& scalars, const py::tuple& codes, uintptr_t grad_logprobs,
                          uintptr_t grad_entropy, uintptr_t loss, uintptr_t stats, uintptr_t share, uintptr_t denominator, uintptr_t workspace,
                          int64_t size, uintptr_t counter, uintptr_t stream) {
    const PolicyArgs a = policy_args(device_rows(shape), arrays, scalars, codes, grad_logprobs, grad_entropy);
    check(cuda::policy_loss(a, results(loss, stats, share, denominator), on(stream, workspace, size, counter)));
  });
  m.def("value_loss", [](const py::tuple& shape, const py::object& values, const py::object& old_values, const py::object& returns,
                         const py::object& mask, double clip, int reduction, double denominator, uintptr_t grad_values, uintptr_t loss,
                         uintptr_t stats, uintptr_t share, uintptr_t given, uintptr_t workspace, int64_t size, uintptr_t counter, uintptr_t stream) {
    const ValueArgs a = value_args(device_rows(shape), values, old_values, returns, mask, clip, reduction, denominator, grad_values);
    check(cuda::value_loss(a, results(loss, stats, share, given), on(stream, workspace, size, counter)));
  });
  m.def("scale", [](uintptr_t d, uintptr_t grad, uintptr_t share, int64_t count, int dtype, uintptr_t out, uintptr_t stream) {
    check(cuda::scale(pointer<const float>(d), pointer<const float>(grad), pointer<const float>(share), count, static_cast<DType>(dtype),
                      pointer(out), on(stream)));
  });
}

// "80;90a" covers 8.0 and, binary compatibility within a major version, 8.6 and 8.9; 90a and 100a are for exactly those.
bool compiled_for(int major, int minor) {
  std::string list = FASTRLHF_TEXT(FASTRLHF_CUDA_ARCH_LIST);
  for (size_t begin = 0; begin < list.size();) {
    size_t end = list.find(' ', begin);
    if (end == std::string::npos) end = list.size();
    std::string one = list.substr(begin, end - begin);
    begin = end + 1;
    const bool exact = !one.empty() && one.back() == 'a';
    if (exact) one.pop_back();
    if (one.empty()) continue;
    const int number = std::stoi(one);
    if (number / 10 == major && (exact ? number % 10 == minor : number % 10 <= minor)) return true;
  }
  return false;
}

#if defined(FASTRLHF_SM90)
constexpr bool sm90 = true;

void bind_sm90(py::module_& m) {
  m.def("linear_logprobs_partials", [](const py::tuple& hidden, const py::tuple& weight, const py::tuple& shape, const py::tuple& labels,
                                       const py::tuple& scaling, const py::tuple& bias, uintptr_t partials, uintptr_t stream) {
    check(cuda::linear_logprobs_partials(linear_logprobs_partials_args(hidden, weight, shape, labels, scaling, bias, partials), on(stream)));
  });
  m.def("linear_logprobs_strip_gradient", [](const py::tuple& hidden, const py::tuple& weight, const py::tuple& shape, const py::tuple& labels,
                                             const py::tuple& scaling, const py::tuple& bias, const py::tuple& statistics, const py::tuple& grads,
                                             const py::tuple& grad, uintptr_t stream) {
    check(cuda::linear_logprobs_strip_gradient(
        linear_logprobs_gradient_args(hidden, weight, shape, labels, scaling, bias, statistics, grads, grad), on(stream)));
  });
  m.def("linear_logprobs_exponentials", [](const py::tuple& hidden, const py::tuple& weight, const py::tuple& shape, const py::tuple& labels,
                                           const py::tuple& scaling, const py::tuple& bias, uintptr_t partials, const py::tuple& exponentials,
                                           uintptr_t references, uintptr_t stream) {
    const LinearLogprobsArgs a = linear_logprobs_partials_args(hidden, weight, shape, labels, scaling, bias, partials);
    check(cuda::linear_logprobs_exponentials(linear_logprobs_exponentials_args(a, exponentials, references), on(stream)));
  });
  m.def("linear_logprobs_exponentials_to_gradient", [](const py::tuple& shape, const py::tuple& labels, const py::tuple& scaling,
                                                       const py::tuple& statistics, const py::tuple& grads, const py::tuple& exponentials,
                                                       uintptr_t references, uintptr_t stream) {
    check(cuda::linear_logprobs_exponentials_to_gradient(
        exponentials_to_gradient_args(shape, labels, scaling, statistics, grads, exponentials, references), on(stream)));
  });
}
#else
constexpr bool sm90 = false;

void bind_sm90(py::module_&) {}
#endif

}  // namespace
}  // namespace fastrlhf

PYBIND11_MODULE(FASTRLHF_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels of fastrlhf: addresses, sizes, strides, dtype codes and a stream in; nothing of torch.";
#if defined(FASTRLHF_CUDA_HOST)
  m.attr("host") = true;
#else
  m.attr("host") = false;
  m.def("runtime_version", [] {
    int version = 0;
    return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
  }, "The CUDA runtime linked in, as 1000 * major + 10 * minor.");
#endif
  m.attr("architectures") = FASTRLHF_TEXT(FASTRLHF_CUDA_ARCH_LIST);
  m.def("compiled_for", fastrlhf::compiled_for, "Whether a device of compute capability (major, minor) can run these kernels.");
  m.def("has_linear_logprobs", [](int major, int minor) {
#if defined(FASTRLHF_CUDA_HOST)
    (void)major, (void)minor;
    return fastrlhf::sm90;
#else
    return fastrlhf::sm90 && major == 9 && minor == 0;
#endif
  }, "Whether this build has linear_logprobs_partials and linear_logprobs_strip_gradient for a device of compute capability (major, minor).");
  m.def("linear_logprobs_parts", [](int64_t vocab) { return fastrlhf::VocabSplit(vocab).parts; },
        "How many parts of a vocabulary linear_logprobs_partials keeps apart.");
  fastrlhf::bind(m);
  fastrlhf::bind_sm90(m);
  fastrlhf::bind_refit_cuda(m);
}
