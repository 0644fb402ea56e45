#include "bind.h"
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
  // arrays: logprobs, old_logprobs, advantages, mask, rollout_logprobs, ref_logprobs, entropy
  // scalars: clip_low, clip_high, dual_clip, ratio_clamp, delta, tau_pos, tau_neg, correction_low, correction_high,
  //          kl_coef, entropy_coef, denominator
  // codes: kind, correction, correction_level, kl_kind, reduction
  m.def("policy_loss", [](const py::tuple& shape, bool f64, const py::tuple& arrays, const py::tuple& scalars,
                          const py::tuple& codes, uintptr_t grad_logprobs, uintptr_t grad_entropy, uintptr_t loss, uintptr_t stats, int threads) {
    double result[1 + policy_stats];
    PolicyArgs a;
    a.rows = rows(shape);
    a.f64 = f64;
    a.logprobs = array(arrays[0]), a.old_logprobs = array(arrays[1]), a.advantages = array(arrays[2]), a.mask = array(arrays[3]);
    a.rollout_logprobs = array(arrays[4]), a.ref_logprobs = array(arrays[5]), a.entropy = array(arrays[6]);
    double* const fields[] = {&a.clip_low, &a.clip_high, &a.dual_clip, &a.ratio_clamp, &a.delta, &a.tau_pos, &a.tau_neg,
                              &a.correction_low, &a.correction_high, &a.kl_coef, &a.entropy_coef, &a.denominator};
    for (size_t i = 0; i < std::size(fields); ++i) *fields[i] = scalars[i].cast<double>();
    a.kind = static_cast<PolicyKind>(codes[0].cast<int>());
    a.correction = static_cast<Correction>(codes[1].cast<int>());
    a.correction_level = static_cast<CorrectionLevel>(codes[2].cast<int>());
    a.kl_kind = codes[3].cast<int>();
    a.reduction = static_cast<Reduction>(codes[4].cast<int>());
    a.grad_logprobs = pointer(grad_logprobs);
    a.grad_entropy = pointer(grad_entropy);
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
    ValueArgs a;
    a.rows = rows(shape);
    a.f64 = f64;
    a.values = array(values), a.old_values = array(old_values), a.returns = array(returns), a.mask = array(mask);
    a.clip = clip;
    a.reduction = static_cast<Reduction>(reduction);
    a.denominator = denominator;
    a.grad_values = pointer(grad_values);
    a.result = result;
    a.threads = threads;
    py::gil_scoped_release release;
    value_loss(a);
    write_result(result, value_stats, f64, loss, stats);
  });
  // inputs: addresses of chosen, rejected, ref_chosen, ref_rejected, chosen_rewards, rejected_rewards (0: absent)
  // scalars: beta, label_smoothing, reward_scale, margin, kl_baseline, desirable_weight, undesirable_weight
  // outputs: addresses of losses, grad_chosen, grad_rejected
  m.def("preference_loss", [](int64_t pairs, int kind, const py::tuple& inputs, const py::tuple& scalars, const py::tuple& outputs) {
    PreferenceArgs a;
    a.pairs = pairs;
    a.kind = static_cast<PreferenceKind>(kind);
    auto input = [&](int i) { return pointer<const double>(inputs[i].cast<uintptr_t>()); };
    auto output = [&](int i) { return pointer<double>(outputs[i].cast<uintptr_t>()); };
    a.chosen = input(0), a.rejected = input(1), a.ref_chosen = input(2), a.ref_rejected = input(3);
    a.chosen_rewards = input(4), a.rejected_rewards = input(5);
    double* const fields[] = {&a.beta, &a.label_smoothing, &a.reward_scale, &a.margin, &a.kl_baseline,
                              &a.desirable_weight, &a.undesirable_weight};
    for (size_t i = 0; i < std::size(fields); ++i) *fields[i] = scalars[i].cast<double>();
    a.losses = output(0), a.grad_chosen = output(1), a.grad_rejected = output(2);
    py::gil_scoped_release release;
    preference_loss(a);
  });
}

}  // namespace fastrlhf
