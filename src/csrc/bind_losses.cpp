#include "bind_losses_args.h"
#include "policy_loss/cpu.h"
#include "preference_loss/cpu.h"
#include "value_loss/cpu.h"

namespace fastrlhf {
namespace {

// The loss, in the compute type, and the statistics, in float.
void write_result(const double* result, int stats, bool f64, uintptr_t loss, uintptr_t to) {
  if (f64) *pointer<double>(loss) = result[0];
  else *pointer<float>(loss) = static_cast<float>(result[0]);
  for (int i = 0; i < stats; ++i) pointer<float>(to)[i] = static_cast<float>(result[1 + i]);
}

}  // namespace

void bind_losses(py::module_& m) {
  m.def("policy_loss", [](const py::tuple& shape, bool f64, const py::tuple& arrays, const py::tuple& scalars,
                          const py::tuple& codes, uintptr_t grad_logprobs, uintptr_t grad_entropy, uintptr_t loss, uintptr_t stats, int threads) {
    double result[1 + policy_stats];
    PolicyArgs a = policy_args(rows(shape), arrays, scalars, codes, grad_logprobs, grad_entropy);
    a.f64 = f64;
    a.result = result;
    a.threads = threads;
    py::gil_scoped_release release;
    policy_loss(a);
    write_result(result, policy_stats, f64, loss, stats);
  });
  m.def("value_loss", [](const py::tuple& shape, bool f64, const py::object& values, const py::object& old_values,
                         const py::object& returns, const py::object& mask, double clip, int reduction, double denominator,
                         uintptr_t grad_values, uintptr_t loss, uintptr_t stats, int threads) {
    double result[1 + value_stats];
    ValueArgs a = value_args(rows(shape), values, old_values, returns, mask, clip, reduction, denominator, grad_values);
    a.f64 = f64;
    a.result = result;
    a.threads = threads;
    py::gil_scoped_release release;
    value_loss(a);
    write_result(result, value_stats, f64, loss, stats);
  });
  // arrays: chosen, rejected, ref_chosen, ref_rejected, chosen_rewards, rejected_rewards, chosen_lengths
  // scalars: beta, label_smoothing, reward_scale, margin, kl_baseline, desirable_weight, undesirable_weight, sft_coef,
  //          denominator
  // outputs: addresses of loss, losses, d_chosen, d_rejected, mean_d_chosen, mean_d_rejected (0: not wanted), stats
  m.def("preference_loss", [](int64_t pairs, bool f64, int kind, const py::tuple& arrays, const py::tuple& scalars, const py::tuple& outputs) {
    PreferenceArgs a;
    a.pairs = pairs;
    a.f64 = f64;
    a.kind = static_cast<PreferenceKind>(kind);
    Array* const inputs[] = {&a.chosen, &a.rejected, &a.ref_chosen, &a.ref_rejected, &a.chosen_rewards, &a.rejected_rewards,
                             &a.chosen_lengths};
    for (size_t i = 0; i < std::size(inputs); ++i) *inputs[i] = array(arrays[i]);
    double* const fields[] = {&a.beta, &a.label_smoothing, &a.reward_scale, &a.margin, &a.kl_baseline,
                              &a.desirable_weight, &a.undesirable_weight, &a.sft_coef, &a.denominator};
    for (size_t i = 0; i < std::size(fields); ++i) *fields[i] = scalars[i].cast<double>();
    void** const results[] = {&a.loss, &a.losses, &a.d_chosen, &a.d_rejected, &a.mean_d_chosen, &a.mean_d_rejected};
    for (size_t i = 0; i < std::size(results); ++i) *results[i] = pointer(outputs[i].cast<uintptr_t>());
    a.stats = pointer<float>(outputs[std::size(results)].cast<uintptr_t>());
    py::gil_scoped_release release;
    preference_loss(a);
  });
  m.def("regression_loss", [](int64_t count, bool f64, const py::object& predictions, const py::object& targets,
                              double ignore_value, uintptr_t loss, uintptr_t grad, uintptr_t stats) {
    RegressionArgs a;
    a.count = count;
    a.f64 = f64;
    a.predictions = array(predictions), a.targets = array(targets);
    a.ignore_value = ignore_value;
    a.loss = pointer(loss), a.grad = pointer(grad);
    a.stats = pointer<float>(stats);
    py::gil_scoped_release release;
    regression_loss(a);
  });
}

}  // namespace fastrlhf
