#include "cpu.h"

#include <cmath>

#include "common/row_value.h"

namespace fastrlhf {
namespace {

// sigmoid(x), sigmoid(-x) and their logarithms from one exponential.
struct Sigmoid {
  double of, of_minus, log, log_minus;
  explicit Sigmoid(double x) {
    const double e = std::exp(x < 0 ? x : -x), l = std::log1p(e), large = 1 / (1 + e), small = e / (1 + e);
    const bool negative = x < 0;
    of = negative ? small : large, of_minus = negative ? large : small;
    log = negative ? x - l : -l, log_minus = negative ? -l : -x - l;
  }
};

// log(p / (1 - p)) of p = e^x, x < 0
double log_odds(double x) { return x - std::log(-std::expm1(x)); }
double log_odds_slope(double x) { return -1 / std::expm1(x); }

struct Loss { double value, chosen, rejected; };  // and its derivatives

Loss on_margin(double value, double slope) { return {value, slope, -slope}; }

// KL between the Bernoulli distributions of parameters sigmoid(a) and sigmoid(b), and its derivatives.
double bernoulli_kl(double a, double b) {
  const Sigmoid s(a), t(b);
  return s.of * (s.log - t.log) + s.of_minus * (s.log_minus - t.log_minus);
}
double bernoulli_kl_da(double a, double b) {
  const Sigmoid s(a);
  return s.of * s.of_minus * (a - b);
}
double bernoulli_kl_db(double a, double b) { return Sigmoid(b).of - Sigmoid(a).of; }

Loss pair_loss(const PreferenceArgs& a, double chosen, double rejected, double g) {
  const double x = a.beta * (chosen - rejected), e = a.label_smoothing;
  switch (a.kind) {
    case PreferenceKind::dpo:
    case PreferenceKind::simpo: {
      const Sigmoid s(a.kind == PreferenceKind::simpo ? x - a.margin : x);
      return on_margin(-(1 - e) * s.log - e * s.log_minus, a.beta * (e * s.of - (1 - e) * s.of_minus));
    }
    case PreferenceKind::robust: {
      const Sigmoid s(x);
      return on_margin((-(1 - e) * s.log + e * s.log_minus) / (1 - 2 * e),
                       -a.beta * ((1 - e) * s.of_minus + e * s.of) / (1 - 2 * e));
    }
    case PreferenceKind::ipo: {
      const double d = chosen - rejected - 1 / (2 * a.beta);
      return on_margin(d * d, 2 * d);
    }
    case PreferenceKind::hinge: return on_margin(x < 1 ? 1 - x : 0, x < 1 ? -a.beta : 0);
    case PreferenceKind::rpo_sq: return on_margin((x - g) * (x - g), 2 * a.beta * (x - g));
    case PreferenceKind::rpo_fwd_kl: return on_margin(bernoulli_kl(x, g), a.beta * bernoulli_kl_da(x, g));
    case PreferenceKind::rpo_bwd_kl: return on_margin(bernoulli_kl(g, x), a.beta * bernoulli_kl_db(g, x));
    case PreferenceKind::orpo: {
      const Sigmoid s(log_odds(chosen) - log_odds(rejected));
      const double slope = -a.beta * s.of_minus;
      if (slope == 0) return {0, 0, 0};  // a certain answer: infinite odds
      return {-a.beta * s.log, slope * log_odds_slope(chosen), -slope * log_odds_slope(rejected)};
    }
    case PreferenceKind::bt:
    case PreferenceKind::margin_bt: {
      const Sigmoid s(chosen - rejected - (a.kind == PreferenceKind::margin_bt ? g : 0));
      return on_margin(-s.log, -s.of_minus);
    }
    case PreferenceKind::scaled_bt: {
      const Sigmoid s(chosen - rejected);
      return on_margin(-g * s.log, -g * s.of_minus);
    }
    default: {  // kto: both halves of the pair on their own
      const double z = a.kl_baseline, s = Sigmoid(a.beta * (chosen - z)).of, t = Sigmoid(a.beta * (z - rejected)).of;
      return {0.5 * (a.desirable_weight * (1 - s) + a.undesirable_weight * (1 - t)),
              -0.5 * a.desirable_weight * a.beta * s * (1 - s), 0.5 * a.undesirable_weight * a.beta * t * (1 - t)};
    }
  }
}

// An output of the compute type.
struct Out {
  void* data;
  bool f64;
  void set(int64_t i, double x) const {
    if (!data) return;
    if (f64) static_cast<double*>(data)[i] = x;
    else static_cast<float*>(data)[i] = static_cast<float>(x);
  }
};

}  // namespace

void preference_loss(const PreferenceArgs& a) {
  const Out losses{a.losses, a.f64}, loss{a.loss, a.f64}, d_chosen{a.d_chosen, a.f64}, d_rejected{a.d_rejected, a.f64},
      mean_d_chosen{a.mean_d_chosen, a.f64}, mean_d_rejected{a.mean_d_rejected, a.f64};
  auto value = [](const Array& x, int64_t i) { return x ? row_value(x, i) : 0; };
  const double pairs = a.pairs > 0 ? static_cast<double>(a.pairs) : 1, over = a.denominator == a.denominator ? a.denominator : pairs;
  const double share = over != 0 ? 1 / over : 0;
  const bool reward = a.kind == PreferenceKind::bt || a.kind == PreferenceKind::margin_bt || a.kind == PreferenceKind::scaled_bt;
  const double scale = reward ? 1 : a.beta;
  double total = 0, sft = 0, accuracy = 0, chosen_total = 0, rejected_total = 0;
  for (int64_t i = 0; i < a.pairs; ++i) {
    const double given = value(a.chosen, i), length = a.chosen_lengths ? row_value(a.chosen_lengths, i) : 1;
    const double chosen = given - value(a.ref_chosen, i), rejected = value(a.rejected, i) - value(a.ref_rejected, i);
    const double better = value(a.chosen_rewards, i), worse = value(a.rejected_rewards, i);
    const Loss l = pair_loss(a, chosen, rejected, reward ? better : a.reward_scale * (better - worse));
    losses.set(i, l.value);
    d_chosen.set(i, l.chosen);
    d_rejected.set(i, l.rejected);
    mean_d_chosen.set(i, (l.chosen - (a.sft_coef != 0 ? a.sft_coef / length : 0)) * share);
    mean_d_rejected.set(i, l.rejected * share);
    total += l.value;
    if (a.sft_coef != 0) sft -= given / length;
    accuracy += chosen > rejected;
    chosen_total += chosen;
    rejected_total += rejected;
  }
  loss.set(0, total * share + (a.sft_coef != 0 ? a.sft_coef * sft * share : 0));
  const double stats[preference_stats] = {accuracy / pairs, scale * (chosen_total - rejected_total) / pairs,
                                          scale * chosen_total / pairs, scale * rejected_total / pairs, sft * share};
  for (int i = 0; i < (reward ? reward_stats : preference_stats); ++i) a.stats[i] = static_cast<float>(stats[i]);
}

void regression_loss(const RegressionArgs& a) {
  const Out loss{a.loss, a.f64}, grad{a.grad, a.f64};
  double square = 0, absolute = 0, count = 0;
  auto error = [&](int64_t i, bool& counted) {
    const double target = row_value(a.targets, i);
    counted = target != a.ignore_value;
    return counted ? row_value(a.predictions, i) - target : 0;
  };
  bool counted;
  for (int64_t i = 0; i < a.count; ++i) {
    const double e = error(i, counted);
    square += e * e;
    absolute += std::abs(e);
    count += counted;
  }
  const double share = count > 0 ? 1 / count : 0;
  if (a.grad) for (int64_t i = 0; i < a.count; ++i) grad.set(i, 2 * error(i, counted) * share);
  loss.set(0, square * share);
  const double stats[regression_stats] = {square * share, absolute * share, count};
  for (int i = 0; i < regression_stats; ++i) a.stats[i] = static_cast<float>(stats[i]);
}

}  // namespace fastrlhf
