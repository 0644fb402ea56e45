// The mathematics of the policy losses, for any vector of tokens: the CPU's, or a GPU thread's one token. Written once.
#pragma once

#include <cmath>

#include "args.h"
#include "common/kl_math.h"
#include "common/reduction.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

struct RowPart {
  double tokens = 0, log_ratio = 0, clipped_log_ratio = 0, positive = 0, negative = 0, advantage = 0, weight = 0, mismatch = 0;

  FASTRLHF_HOST_DEVICE void add(const RowPart& o) {
    tokens += o.tokens, log_ratio += o.log_ratio, clipped_log_ratio += o.clipped_log_ratio;
    positive += o.positive, negative += o.negative, advantage += o.advantage, weight += o.weight;
    mismatch += o.mismatch;
  }
};

struct RowPlan {
  double weight = 0;        // of each counted token in the loss and its gradient
  double ratio = 1;         // the sequence's, for gspo and gmpo
  double ratio_grad = 0;    // gspo: d objective / d logprobs_t
  double advantage = 0;     // gmpo: the sequence's mean
  double mean_weight = 1;   // gmpo: of the tokens' importance weights
  double correction = 1;    // the sequence's importance weight
  double uncorrected = 1;
};

FASTRLHF_HOST_DEVICE constexpr bool by_sequence(PolicyKind kind) { return kind == PolicyKind::gspo || kind == PolicyKind::gmpo; }

FASTRLHF_HOST_DEVICE inline bool corrects_tokens(const PolicyArgs& a) {
  return a.correction != Correction::none && a.correction_level == CorrectionLevel::token;
}
FASTRLHF_HOST_DEVICE inline bool corrects_sequences(const PolicyArgs& a) {
  return a.correction != Correction::none && a.correction_level != CorrectionLevel::token;
}

template <class V>
FASTRLHF_HOST_DEVICE inline V clamp(V x, V low, V high) { return max(low, min(high, x)); }

template <class V>
FASTRLHF_HOST_DEVICE inline V importance(const PolicyArgs& a, V ratio, V& corrected) {
  using T = typename V::T;
  const V low = V::set(static_cast<T>(a.correction_low)), high = V::set(static_cast<T>(a.correction_high));
  const V zero = V::set(0), one = V::set(1);
  V weight = ratio;
  if (a.correction == Correction::tis) weight = min(high, ratio);
  if (a.correction == Correction::mis) weight = select(ratio <= high, ratio, zero);
  if (a.correction == Correction::icepop) weight = select(ratio <= high, select(ratio >= low, ratio, zero), zero);
  corrected = select(weight != ratio, one, zero);
  return weight;
}

constexpr double mismatch_bound = 20;  // of a log importance ratio: e^20 is far above any cap

// What a token is: weight in the loss, log-probabilities, advantage. What is absent is 0 and not looked at.
template <class V>
struct Token { V mask, logprob, old, advantage, rollout, ref, entropy; };

// What must be known of a whole row before its tokens' losses.
template <class V>
struct RowSums {
  V tokens, log_ratio, clipped, positive, negative, advantage, weights, mismatch;

  FASTRLHF_HOST_DEVICE RowSums() {
    tokens = log_ratio = clipped = positive = negative = advantage = weights = mismatch = V::set(0);
  }

  FASTRLHF_HOST_DEVICE void add(const PolicyArgs& a, const Token<V>& t) {
    using T = typename V::T;
    const V zero = V::set(0), m = t.mask, bound = V::set(static_cast<T>(mismatch_bound));
    tokens = tokens + m;
    const auto counted = m != zero;
    if (corrects_sequences(a)) mismatch = mismatch + select(counted, m * (t.old - t.rollout), zero);
    if (!by_sequence(a.kind)) return;
    const V low = V::set(static_cast<T>(-a.clip_low)), high = V::set(static_cast<T>(a.clip_high));
    const V A = t.advantage, d = t.logprob - t.old;
    V weight = m, ignored;
    if (corrects_tokens(a)) weight = m * importance(a, exp(clamp(t.old - t.rollout, zero - bound, bound)), ignored);
    log_ratio = log_ratio + select(counted, m * d, zero);
    const V kept = select(A > zero, min(d, high), select(A < zero, max(d, low), zero));
    clipped = clipped + select(counted, m * kept, zero);
    positive = positive + select(counted, weight * max(zero, A), zero);
    negative = negative + select(counted, weight * min(zero, A), zero);
    advantage = advantage + select(counted, m * A, zero);
    weights = weights + select(counted, weight, zero);
  }
};

FASTRLHF_HOST_DEVICE inline double scalar_importance(const PolicyArgs& a, double ratio) {
  if (a.correction == Correction::tis) return ratio < a.correction_high ? ratio : a.correction_high;
  if (ratio > a.correction_high) return 0;
  return a.correction == Correction::icepop && ratio < a.correction_low ? 0 : ratio;
}

FASTRLHF_HOST_DEVICE inline RowPlan close_row(const PolicyArgs& a, const RowPart& p) {
  RowPlan plan;
  plan.weight = row_factor(a.reduction, p.tokens);
  if (p.tokens == 0) return plan;
  if (corrects_sequences(a)) {
    double log_weight = a.correction_level == CorrectionLevel::geometric ? p.mismatch / p.tokens : p.mismatch;
    log_weight = log_weight > mismatch_bound ? mismatch_bound : log_weight < -mismatch_bound ? -mismatch_bound : log_weight;
    plan.uncorrected = std::exp(log_weight);
    plan.correction = scalar_importance(a, plan.uncorrected);
  }
  if (a.kind == PolicyKind::gspo) {
    const double mean = p.log_ratio / p.tokens;
    const bool inside = std::fabs(mean) <= a.ratio_clamp;
    const double r = std::exp(inside ? mean : mean > 0 ? a.ratio_clamp : -a.ratio_clamp);
    plan.ratio = r;
    // the objective is A min(free, held) for A > 0 and A min(max(free, held), dual_clip) for A < 0
    const double low = 1 - a.clip_low, high = 1 + a.clip_high;
    const double free_ = r < a.delta ? r : a.delta, held = r < low ? low : r > high ? high : r;
    const bool free_moves = r <= a.delta, held_moves = r >= low && r <= high;
    const bool up = free_ <= held ? free_moves : held_moves;
    const bool down = (free_ >= held ? free_moves : held_moves) && (free_ > held ? free_ : held) <= a.dual_clip;
    const double slope = (up ? p.positive : 0) + (down ? p.negative : 0);
    plan.ratio_grad = inside ? slope * r / p.tokens * plan.correction : 0;
  } else if (a.kind == PolicyKind::gmpo) {
    plan.ratio = std::exp(p.clipped_log_ratio / p.tokens);
    plan.advantage = p.advantage / p.tokens;
    plan.mean_weight = (corrects_tokens(a) ? p.weight : p.tokens) / p.tokens * plan.correction;
  }
  return plan;
}

// objective (to be maximised) and d objective / d logprobs of each token, before any correction, and the clip counts.
template <PolicyKind kind, class V>
FASTRLHF_HOST_DEVICE inline void objective(const PolicyArgs& a, const RowPlan& plan, V logprob, V A, V d, V r, V inside, V& value, V& slope, V& low, V& high, V& dual) {
  using T = typename V::T;
  const V zero = V::set(0), one = V::set(1);
  const V floor_ = V::set(static_cast<T>(1 - a.clip_low)), ceiling = V::set(static_cast<T>(1 + a.clip_high));
  low = high = dual = zero;
  if constexpr (kind == PolicyKind::ppo || kind == PolicyKind::gspo) {
    const V delta = V::set(static_cast<T>(a.delta)), c = V::set(static_cast<T>(a.dual_clip));
    const auto some = A != zero;  // r may be inf, and 0 * inf is not 0
    const V free_ = select(some, A * min(r, delta), zero), held = A * clamp(r, floor_, ceiling);
    const auto clipped = held < free_;
    value = select(clipped, held, free_);
    const auto free_moves = r <= delta, held_moves = clamp(r, floor_, ceiling) >= r;
    const V along = select(some, A * r * inside, zero);
    slope = select(clipped, select(held_moves, select(r >= floor_, along, zero), zero), select(free_moves, along, zero));
    high = select(clipped, select(A > zero, one, zero), zero);
    low = select(clipped, select(A < zero, one, zero), zero);
    const V least = select(A < zero, A * c, V::set(-INFINITY));
    const auto bounded = value < least;
    value = select(bounded, least, value);
    slope = select(bounded, zero, slope);
    dual = select(bounded, one, zero);
    if (kind == PolicyKind::gspo) slope = V::set(static_cast<T>(plan.ratio_grad));
  } else if constexpr (kind == PolicyKind::reinforce) {
    value = A * logprob;
    slope = A;
  } else if constexpr (kind == PolicyKind::cispo) {
    slope = A * clamp(r, floor_, ceiling);
    value = slope * logprob;
    high = select(r > ceiling, one, zero);
    low = select(r < floor_, one, zero);
  } else if constexpr (kind == PolicyKind::sapo) {
    const V tau = select(A > zero, V::set(static_cast<T>(a.tau_pos)), V::set(static_cast<T>(a.tau_neg)));
    const V gate = one / (one + exp(zero - tau * (r - one)));
    const V bend = gate * (one - gate);
    value = A * gate * V::set(4) / tau;
    slope = select(bend > zero, A * bend * V::set(4) * r * inside, zero);
  } else {
    const V up = V::set(static_cast<T>(a.clip_high)), down = V::set(static_cast<T>(-a.clip_low));
    const V mean = V::set(static_cast<T>(plan.advantage)), ratio = V::set(static_cast<T>(plan.ratio));
    high = select(A > zero, select(d > up, one, zero), zero);
    low = select(A < zero, select(d < down, one, zero), zero);
    value = mean * ratio;
    slope = select(A != zero, mean * ratio * V::set(static_cast<T>(plan.mean_weight)) * (one - high) * (one - low), zero);
  }
}

// Sums over tokens of losses and statistics.
template <class V>
struct TokenSums {
  V loss, low, high, dual, ratio, k1, k3, ref_kl, entropy, tokens, mismatch, correction, corrected;
  V ratio_min, ratio_max, mismatch_max;

  FASTRLHF_HOST_DEVICE TokenSums() {
    loss = low = high = dual = ratio = k1 = k3 = ref_kl = entropy = tokens = mismatch = correction = corrected = V::set(0);
    ratio_min = V::set(INFINITY), ratio_max = V::set(-INFINITY), mismatch_max = V::set(0);
  }

  // Adds a token; returns d loss / d logprob, before its weight.
  template <PolicyKind kind>
  FASTRLHF_HOST_DEVICE V add(const PolicyArgs& a, const RowPlan& plan, const Token<V>& t) {
    using T = typename V::T;
    const V zero = V::set(0), one = V::set(1), m = t.mask;
    const V bound = V::set(static_cast<T>(a.ratio_clamp)), mismatch_limit = V::set(static_cast<T>(mismatch_bound));
    const auto counted = m != zero;
    // what is not counted may hold anything: it becomes a token of ratio 1 and advantage 0
    const V lp = select(counted, t.logprob, zero), old = select(counted, t.old, zero), A = select(counted, t.advantage, zero);
    const V log_ratio = lp - old, d = clamp(log_ratio, zero - bound, bound);
    const V inside = select(max(log_ratio, zero - log_ratio) <= bound, one, zero);
    V r = exp(d), value, slope, l, h, c;
    k3 = k3 + m * select(r > V::set(T(0.75)), select(r < V::set(T(1.5)), expm1_minus_x(d), r - one - d), r - one - d);
    k1 = k1 - m * d;
    if (by_sequence(kind)) r = V::set(static_cast<T>(plan.ratio));
    objective<kind>(a, plan, lp, A, log_ratio, r, inside, value, slope, l, h, c);
    V w = V::set(static_cast<T>(plan.correction));
    if (a.rollout_logprobs) {
      const V difference = old - select(counted, t.rollout, zero);
      const V size = max(difference, zero - difference);
      mismatch = mismatch + m * size;
      mismatch_max = max(size, mismatch_max);
      if (corrects_tokens(a)) {
        V changed;
        w = importance(a, exp(clamp(difference, zero - mismatch_limit, mismatch_limit)), changed);
        corrected = corrected + m * changed;
      } else if (corrects_sequences(a) && plan.correction != plan.uncorrected) {
        corrected = corrected + m;
      }
    }
    value = zero - w * value;
    slope = zero - (by_sequence(kind) ? slope : w * slope);  // of a sequence's ratio, the slope has its weights in it already
    if (a.ref_logprobs) {
      const V unbounded = V::set(INFINITY), coef = V::set(static_cast<T>(a.kl_coef));
      V kl, kl_grad;
      kl_clamped(static_cast<KlKind>(a.kl_kind), lp - select(counted, t.ref, zero), unbounded, unbounded, false, kl, kl_grad);
      ref_kl = ref_kl + m * kl;
      value = fma(coef, kl, value);
      slope = fma(coef, kl_grad, slope);
    }
    if (a.entropy) {
      const V H = select(counted, t.entropy, zero);
      entropy = entropy + m * H;
      value = value - V::set(static_cast<T>(a.entropy_coef)) * H;
    }
    loss = loss + m * value;
    tokens = tokens + m;
    low = low + m * l, high = high + m * h, dual = dual + m * c;
    ratio = ratio + m * r;
    ratio_min = select(counted, min(r, ratio_min), ratio_min);
    ratio_max = select(counted, max(r, ratio_max), ratio_max);
    correction = correction + m * w;
    return slope;
  }
};

// The same over units, rows or blocks, in double; `loss` has its row's weight in it.
struct PolicySums {
  static constexpr int size = 16, added = 13;  // then the least ratio, the greatest, and the greatest mismatch
  double at[size] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, INFINITY, -INFINITY, 0};

  FASTRLHF_HOST_DEVICE void add(const PolicySums& o) {
    for (int i = 0; i < added; ++i) at[i] += o.at[i];
    if (o.at[13] < at[13]) at[13] = o.at[13];
    if (o.at[14] > at[14]) at[14] = o.at[14];
    if (o.at[15] > at[15]) at[15] = o.at[15];
  }

  // set(i, value): the loss, then the statistics of kernels/policy_loss/reference.py.
  template <class Set>
  FASTRLHF_HOST_DEVICE static void write(const double* at, double share, Set&& set) {
    const double tokens = at[9];
    const bool any = tokens != 0;
    const double over = any ? 1 / tokens : 0;
    set(0, any ? at[0] * share : 0);
    for (int i = 1; i <= 4; ++i) set(i, at[i] * over);  // low, high, dual, ratio
    set(5, any ? at[13] : 0);
    set(6, any ? at[14] : 0);
    for (int i = 5; i <= 8; ++i) set(2 + i, at[i] * over);  // k1, k3, ref_kl, entropy
    set(11, tokens);
    set(12, at[10] * over);
    set(13, at[15]);
    set(14, at[11] * over);
    set(15, at[12] * over);
  }
};

// f(constant of the kind)
template <PolicyKind kind> struct KindConstant { static constexpr PolicyKind value = kind; };
template <class F>
inline void with_policy_kind(PolicyKind kind, F&& f) {
  switch (kind) {
    case PolicyKind::ppo: return f(KindConstant<PolicyKind::ppo>{});
    case PolicyKind::reinforce: return f(KindConstant<PolicyKind::reinforce>{});
    case PolicyKind::cispo: return f(KindConstant<PolicyKind::cispo>{});
    case PolicyKind::sapo: return f(KindConstant<PolicyKind::sapo>{});
    case PolicyKind::gspo: return f(KindConstant<PolicyKind::gspo>{});
    case PolicyKind::gmpo: return f(KindConstant<PolicyKind::gmpo>{});
  }
}

}}}  // namespace
