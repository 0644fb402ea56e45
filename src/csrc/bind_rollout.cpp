#include <cmath>

#include "bind_rollout_args.h"
#include "gae/cpu.h"
#include "group_advantages/cpu.h"
#include "kl/cpu.h"
#include "masked_stats/cpu.h"

namespace fastrlhf {
namespace {

KlFullArgs read_kl_full(const py::tuple& logits, const py::tuple& ref_logits, int64_t rows, int64_t vocab, int direction,
                        double temperature, uintptr_t mask, uintptr_t out, uintptr_t stats, int threads) {
  KlFullArgs a;
  a.logits = matrix(logits);
  a.ref_logits = matrix(ref_logits);
  a.rows = rows;
  a.vocab = vocab;
  a.direction = static_cast<KlDirection>(direction);
  a.temperature = temperature;
  a.mask = pointer<const uint8_t>(mask);
  a.out = pointer(out);
  a.stats = pointer(stats);
  a.threads = threads;
  return a;
}

}  // namespace

void bind_rollout(py::module_& m) {
  // One call for shape_rewards, gae, discounted_returns and experience: what is None or 0 is not computed.
  m.def("rollout", [](const py::tuple& shape, bool f64, const py::object& rewards, const py::object& scores,
                      const py::object& logprobs, const py::object& ref_logprobs, const py::object& values,
                      const py::object& mask, const py::object& bootstrap, const py::tuple& shaping, double gamma,
                      double lam, uintptr_t lams, int mask_mode, uintptr_t shaped, uintptr_t kl_, uintptr_t advantages,
                      uintptr_t returns, bool whiten, int threads) {
    RolloutArgs a = rollout_args(rows(shape), rewards, scores, logprobs, ref_logprobs, values, mask, bootstrap, shaping, gamma, lam, lams,
                                 mask_mode, shaped, kl_, advantages, returns);
    a.f64 = f64;
    check_unit_interval(a.lams, a.rows.count, "lam");
    a.whiten = whiten;
    a.threads = threads;
    py::gil_scoped_release release;
    rollout(a);
  });
  m.def("moments", [](const py::tuple& shape, bool f64, const py::object& x, const py::object& mask, int threads) {
    double result[3];
    MomentsArgs a;
    a.rows = rows(shape);
    a.f64 = f64;
    a.x = array(x), a.mask = array(mask);
    a.moments = result;
    a.threads = threads;
    {
      py::gil_scoped_release release;
      masked_moments(a);
    }
    return py::make_tuple(result[0], result[1], result[2]);
  });
  m.def("row_sums", [](const py::tuple& shape, bool f64, const py::object& x, const py::object& mask, bool average,
                       uintptr_t sums, uintptr_t counts, int threads) {
    RowSumsArgs a;
    a.rows = rows(shape);
    a.f64 = f64;
    a.x = array(x), a.mask = array(mask);
    a.average = average;
    a.sums = pointer(sums), a.counts = pointer(counts);
    a.threads = threads;
    py::gil_scoped_release release;
    row_sums(a);
  });
  m.def("standardize", [](const py::tuple& shape, bool f64, const py::object& x, const py::object& mask, double shift,
                          double scale, double back, uintptr_t out, int threads) {
    StandardizeArgs a;
    a.rows = rows(shape);
    a.f64 = f64;
    a.x = array(x), a.mask = array(mask);
    a.shift = shift, a.scale = scale, a.back = back;
    a.out = pointer(out);
    a.threads = threads;
    py::gil_scoped_release release;
    standardize(a);
  });
  // x whitened into out; returns (mean, scale)
  m.def("whiten", [](const py::tuple& shape, bool f64, const py::object& x, const py::object& mask, bool shift_mean,
                     bool unbiased, double eps, uintptr_t out, int threads) {
    double moments[3];
    MomentsArgs first;
    first.rows = rows(shape);
    first.f64 = f64;
    first.x = array(x), first.mask = array(mask);
    first.moments = moments;
    first.threads = threads;
    StandardizeArgs second;
    second.rows = first.rows;
    second.f64 = f64;
    second.x = first.x, second.mask = first.mask;
    second.out = pointer(out);
    second.threads = threads;
    {
      py::gil_scoped_release release;
      masked_moments(first);
      const double over = unbiased ? moments[0] - 1 : moments[0], spread = (over > 0 ? moments[2] / over : 0) + eps;
      second.shift = moments[1];
      second.scale = spread > 0 ? 1 / std::sqrt(spread) : 0;
      second.back = shift_mean ? 0 : moments[1];
      standardize(second);
    }
    return py::make_tuple(second.shift, second.scale);
  });
  m.def("group_advantages", [](int64_t count, bool f64, const py::object& scores, const py::object& group_ids,
                               const py::object& lengths, int kind, double eps, bool unbiased, uintptr_t advantages) {
    GroupArgs a;
    a.count = count;
    a.f64 = f64;
    a.scores = array(scores), a.group_ids = array(group_ids), a.lengths = array(lengths);
    a.kind = static_cast<GroupKind>(kind);
    a.eps = eps, a.unbiased = unbiased;
    a.advantages = pointer(advantages);
    py::gil_scoped_release release;
    group_advantages(a);
  });
  m.def("kl", [](const py::tuple& shape, bool f64, const py::object& logprobs, const py::object& ref_logprobs, int kind,
                 double clamp_input, double clamp_output, bool straight_through, uintptr_t grad, uintptr_t out, int threads) {
    KlArgs a;
    a.rows = rows(shape);
    a.f64 = f64;
    a.logprobs = array(logprobs), a.ref_logprobs = array(ref_logprobs);
    a.kind = kind;
    a.clamp_input = clamp_input, a.clamp_output = clamp_output;
    a.straight_through = straight_through;
    a.grad = pointer(grad);
    a.out = pointer(out);
    a.threads = threads;
    py::gil_scoped_release release;
    kl(a);
  });
  m.def("kl_full_forward", [](const py::tuple& logits, const py::tuple& ref_logits, int64_t rows, int64_t vocab, int direction,
                              double temperature, uintptr_t mask, uintptr_t out, uintptr_t stats, int threads) {
    const KlFullArgs a = read_kl_full(logits, ref_logits, rows, vocab, direction, temperature, mask, out, stats, threads);
    py::gil_scoped_release release;
    kl_full_forward(a);
  });
  m.def("kl_full_backward", [](const py::tuple& logits, const py::tuple& ref_logits, int64_t rows, int64_t vocab, int direction,
                               double temperature, uintptr_t mask, uintptr_t out, uintptr_t stats, uintptr_t grad,
                               const py::tuple& grad_logits, const py::tuple& grad_ref_logits, int threads) {
    KlFullArgs a = read_kl_full(logits, ref_logits, rows, vocab, direction, temperature, mask, out, stats, threads);
    a.grad = pointer(grad);
    a.grad_logits = matrix(grad_logits);
    a.grad_ref_logits = matrix(grad_ref_logits);
    py::gil_scoped_release release;
    kl_full_backward(a);
  });
}

}  // namespace fastrlhf
