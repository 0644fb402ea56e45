#include "cpu.h"

#include <cmath>
#include <limits>

namespace fastrlhf {
namespace {

double log_sigmoid(double x) { return x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x)); }
double sigmoid(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }

// log(e^-x - 1), x < 0: minus the log-odds of a probability e^x
double log_odds(double x) { return x - std::log(-std::expm1(x)); }
double log_odds_slope(double x) { return -1 / std::expm1(x); }

struct Loss { double value, chosen, rejected; };  // and its derivatives

Loss on_margin(double value, double slope) { return {value, slope, -slope}; }

// KL between the Bernoulli distributions of parameters sigmoid(a) and sigmoid(b), and its derivatives.
double bernoulli_kl(double a, double b) {
  return sigmoid(a) * (log_sigmoid(a) - log_sigmoid(b)) + sigmoid(-a) * (log_sigmoid(-a) - log_sigmoid(-b));
}
double bernoulli_kl_da(double a, double b) { return sigmoid(a) * sigmoid(-a) * (a - b); }
double bernoulli_kl_db(double a, double b) { return sigmoid(b) - sigmoid(a); }

Loss pair_loss(const PreferenceArgs& a, double chosen, double rejected, double g) {
  const double x = a.beta * (chosen - rejected), e = a.label_smoothing;
  switch (a.kind) {
    case PreferenceKind::dpo:
      return on_margin(-(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x), a.beta * (e * sigmoid(x) - (1 - e) * sigmoid(-x)));
    case PreferenceKind::robust:
      return on_margin((-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e),
                       -a.beta * ((1 - e) * sigmoid(-x) + e * sigmoid(x)) / (1 - 2 * e));
    case PreferenceKind::ipo: {
      const double d = chosen - rejected - 1 / (2 * a.beta);
      return on_margin(d * d, 2 * d);
    }
    case PreferenceKind::hinge: return on_margin(x < 1 ? 1 - x : 0, x < 1 ? -a.beta : 0);
    case PreferenceKind::rpo_sq: return on_margin((x - g) * (x - g), 2 * a.beta * (x - g));
    case PreferenceKind::rpo_fwd_kl: return on_margin(bernoulli_kl(x, g), a.beta * bernoulli_kl_da(x, g));
    case PreferenceKind::rpo_bwd_kl: return on_margin(bernoulli_kl(g, x), a.beta * bernoulli_kl_db(g, x));
    case PreferenceKind::simpo: {
      const double y = x - a.margin;
      return on_margin(-(1 - e) * log_sigmoid(y) - e * log_sigmoid(-y), a.beta * (e * sigmoid(y) - (1 - e) * sigmoid(-y)));
    }
    case PreferenceKind::orpo: {
      const double y = log_odds(chosen) - log_odds(rejected), slope = -a.beta * sigmoid(-y);
      if (slope == 0) return {0, 0, 0};  // a certain answer: infinite odds
      return {-a.beta * log_sigmoid(y), slope * log_odds_slope(chosen), -slope * log_odds_slope(rejected)};
    }
    default: {  // kto: both halves of the pair on their own
      const double z = a.kl_baseline, s = sigmoid(a.beta * (chosen - z)), t = sigmoid(a.beta * (z - rejected));
      return {0.5 * (a.desirable_weight * (1 - s) + a.undesirable_weight * (1 - t)),
              -0.5 * a.desirable_weight * a.beta * s * (1 - s), 0.5 * a.undesirable_weight * a.beta * t * (1 - t)};
    }
  }
}

}  // namespace

void preference_loss(const PreferenceArgs& a) {
  for (int64_t i = 0; i < a.pairs; ++i) {
    const double g = a.chosen_rewards ? a.reward_scale * (a.chosen_rewards[i] - a.rejected_rewards[i]) : 0;
    const Loss loss = pair_loss(a, a.chosen[i] - (a.ref_chosen ? a.ref_chosen[i] : 0),
                                a.rejected[i] - (a.ref_rejected ? a.ref_rejected[i] : 0), g);
    a.losses[i] = loss.value, a.grad_chosen[i] = loss.chosen, a.grad_rejected[i] = loss.rejected;
  }
}

}  // namespace fastrlhf
