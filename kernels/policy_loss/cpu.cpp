#include "cpu.h"

#include "common/kl_math.h"
#include "common/reduction.h"
#include "common/tokens.h"

namespace fastrlhf { namespace FASTRLHF_ISA {
namespace {

// Two phases over units of a row. The first counts tokens and, for what depends on a whole sequence, sums it; rows are
// then closed in order; the second computes losses, gradients and statistics.
struct RowPart {
  double tokens = 0, log_ratio = 0, clipped_log_ratio = 0, positive = 0, negative = 0, advantage = 0, weight = 0, mismatch = 0;

  void add(const RowPart& o) {
    tokens += o.tokens, log_ratio += o.log_ratio, clipped_log_ratio += o.clipped_log_ratio;
    positive += o.positive, negative += o.negative, advantage += o.advantage, weight += o.weight;
    mismatch += o.mismatch;
  }
};

struct RowPlan {
  double weight = 0;        // of each counted token in the loss
  double ratio = 1;         // the sequence's, for gspo and gmpo
  double ratio_grad = 0;    // gspo: d objective / d logprobs_t
  double advantage = 0;     // gmpo: the sequence's mean
  double mean_weight = 1;   // gmpo: of the tokens' importance weights
  double correction = 1;    // the sequence's importance weight
  double uncorrected = 1;
};

struct Sums {
  double loss = 0, low = 0, high = 0, dual = 0, ratio = 0, k1 = 0, k3 = 0, ref_kl = 0, entropy = 0, tokens = 0,
         mismatch = 0, correction = 0, corrected = 0;
  double ratio_min = INFINITY, ratio_max = -INFINITY, mismatch_max = 0;
};

template <class T>
struct Chunk {
  Buffer<T> logprobs, old, advantages, mask, rollout, ref, entropy, grad, grad_entropy;
};

template <class T>
struct Inputs {
  const T *logprobs, *old, *advantages, *mask, *rollout, *ref, *entropy;
};

template <class T>
Inputs<T> read(const PolicyArgs& a, int64_t b, int64_t t, int64_t n, Chunk<T>& c) {
  auto maybe = [&](const Array& x, Buffer<T>& buffer) { return x ? fetch<T>(x, a.rows, b, t, n, buffer) : nullptr; };
  return {fetch<T>(a.logprobs, a.rows, b, t, n, c.logprobs), fetch<T>(a.old_logprobs, a.rows, b, t, n, c.old),
          fetch<T>(a.advantages, a.rows, b, t, n, c.advantages), fetch_mask<T>(a.mask, a.rows, b, t, n, c.mask),
          maybe(a.rollout_logprobs, c.rollout), maybe(a.ref_logprobs, c.ref), maybe(a.entropy, c.entropy)};
}

template <class V>
V clamp(V x, V low, V high) { return max(low, min(high, x)); }

template <class V>
V importance(const PolicyArgs& a, V ratio, V& corrected) {
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

template <class T>
RowPart row_part(const PolicyArgs& a, const Inputs<T>& in, int64_t n) {
  using V = typename VectorOf<T>::type;
  const V zero = V::set(0);
  const bool sequence = a.kind == PolicyKind::gspo || a.kind == PolicyKind::gmpo;
  const bool corrected = a.correction != Correction::none && a.correction_level != CorrectionLevel::token;
  const bool token_weights = a.correction != Correction::none && !corrected;
  V tokens = zero, log_ratio = zero, clipped = zero, positive = zero, negative = zero, advantage = zero, weights = zero,
    mismatch = zero;
  const V low = V::set(static_cast<T>(-a.clip_low)), high = V::set(static_cast<T>(a.clip_high));
  const V bound = V::set(static_cast<T>(mismatch_bound));
  for (int64_t i = 0; i < n; i += V::W) {
    const V m = V::load(in.mask + i);
    tokens = tokens + m;
    if (!sequence && !corrected) continue;
    const auto counted = m != zero;
    if (corrected) mismatch = mismatch + select(counted, m * (V::load(in.old + i) - V::load(in.rollout + i)), zero);
    if (!sequence) continue;
    const V A = V::load(in.advantages + i), d = V::load(in.logprobs + i) - V::load(in.old + i);
    V weight = m, ignored;
    if (token_weights) weight = m * importance(a, exp(clamp(V::load(in.old + i) - V::load(in.rollout + i), zero - bound, bound)), ignored);
    log_ratio = log_ratio + select(counted, m * d, zero);
    const V kept = select(A > zero, min(d, high), select(A < zero, max(d, low), zero));
    clipped = clipped + select(counted, m * kept, zero);
    positive = positive + select(counted, weight * max(zero, A), zero);
    negative = negative + select(counted, weight * min(zero, A), zero);
    advantage = advantage + select(counted, m * A, zero);
    weights = weights + select(counted, weight, zero);
  }
  RowPart part;
  part.tokens = sum(tokens), part.log_ratio = sum(log_ratio), part.clipped_log_ratio = sum(clipped);
  part.positive = sum(positive), part.negative = sum(negative), part.advantage = sum(advantage), part.weight = sum(weights), part.mismatch = sum(mismatch);
  return part;
}

double scalar_importance(const PolicyArgs& a, double ratio) {
  if (a.correction == Correction::tis) return ratio < a.correction_high ? ratio : a.correction_high;
  if (ratio > a.correction_high) return 0;
  return a.correction == Correction::icepop && ratio < a.correction_low ? 0 : ratio;
}

RowPlan close_row(const PolicyArgs& a, const RowPart& p, const Totals& totals) {
  RowPlan plan;
  plan.weight = row_weight(a.reduction, a.denominator, totals, p.tokens, a.rows.length);
  if (p.tokens == 0) return plan;
  if (a.correction != Correction::none && a.correction_level != CorrectionLevel::token) {
    double log_weight = a.correction_level == CorrectionLevel::geometric ? p.mismatch / p.tokens : p.mismatch;
    log_weight = log_weight > mismatch_bound ? mismatch_bound : log_weight < -mismatch_bound ? -mismatch_bound : log_weight;
    plan.uncorrected = std::exp(log_weight);
    plan.correction = scalar_importance(a, plan.uncorrected);
  }
  if (a.kind == PolicyKind::gspo) {
    const double mean = p.log_ratio / p.tokens;
    const bool inside = std::abs(mean) <= a.ratio_clamp;
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
    plan.mean_weight = (a.correction == Correction::none || a.correction_level != CorrectionLevel::token ? p.tokens : p.weight) / p.tokens * plan.correction;
  }
  return plan;
}

// objective (to be maximised) and d objective / d logprobs of each token, before any correction, and the clip counts.
template <PolicyKind kind, class V>
void objective(const PolicyArgs& a, const RowPlan& plan, V logprob, V A, V d, V r, V inside, V& value, V& slope, V& low, V& high, V& dual) {
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

template <PolicyKind kind, class T>
void chunk_loss(const PolicyArgs& a, const RowPlan& plan, const Inputs<T>& in, int64_t n, T* grad, T* grad_entropy, Sums& sums) {
  using V = typename VectorOf<T>::type;
  const V zero = V::set(0), one = V::set(1), weight = V::set(static_cast<T>(plan.weight));
  const V bound = V::set(static_cast<T>(a.ratio_clamp)), mismatch_limit = V::set(static_cast<T>(mismatch_bound));
  const bool tokenwise = a.correction != Correction::none && a.correction_level == CorrectionLevel::token;
  const V row_correction = V::set(static_cast<T>(plan.correction)), row_ratio = V::set(static_cast<T>(plan.ratio));
  const V kl_coef = V::set(static_cast<T>(a.kl_coef)), entropy_coef = V::set(static_cast<T>(a.entropy_coef));
  const V unbounded = V::set(INFINITY);
  V loss = zero, low = zero, high = zero, dual = zero, ratio = zero, k1 = zero, k3 = zero, ref_kl = zero, entropy = zero,
    tokens = zero, mismatch = zero, correction = zero, corrected = zero;
  double total = 0;
  V ratio_min = V::set(INFINITY), ratio_max = V::set(-INFINITY), mismatch_max = zero;
  for (int64_t i = 0; i < n; i += V::W) {
    const V m = V::load(in.mask + i);
    const auto counted = m != zero;
    // what is not counted may hold anything: it becomes a token of ratio 1 and advantage 0
    const V lp = select(counted, V::load(in.logprobs + i), zero), old = select(counted, V::load(in.old + i), zero);
    const V A = select(counted, V::load(in.advantages + i), zero);
    const V log_ratio = lp - old, d = clamp(log_ratio, zero - bound, bound);
    const V inside = select(max(log_ratio, zero - log_ratio) <= bound, one, zero);
    V r = exp(d), value, slope, l, h, c;
    k3 = k3 + m * select(r > V::set(T(0.75)), select(r < V::set(T(1.5)), expm1_minus_x(d), r - one - d), r - one - d);
    k1 = k1 - m * d;
    if (kind == PolicyKind::gspo || kind == PolicyKind::gmpo) r = row_ratio;
    objective<kind>(a, plan, lp, A, log_ratio, r, inside, value, slope, l, h, c);
    V w = row_correction;
    if (in.rollout) {
      const V difference = old - select(counted, V::load(in.rollout + i), zero);
      const V size = max(difference, zero - difference);
      mismatch = mismatch + m * size;
      mismatch_max = max(size, mismatch_max);
      if (tokenwise) {
        V changed;
        w = importance(a, exp(clamp(difference, zero - mismatch_limit, mismatch_limit)), changed);
        corrected = corrected + m * changed;
      }
    }
    value = zero - w * value;
    // of a sequence's ratio, the slope has its weights in it already
    slope = zero - (kind == PolicyKind::gspo || kind == PolicyKind::gmpo ? slope : w * slope);
    if (in.ref) {
      V kl, kl_grad;
      kl_clamped(static_cast<KlKind>(a.kl_kind), lp - select(counted, V::load(in.ref + i), zero), unbounded, unbounded, false, kl, kl_grad);
      ref_kl = ref_kl + m * kl;
      value = fma(kl_coef, kl, value);
      slope = fma(kl_coef, kl_grad, slope);
    }
    if (in.entropy) {
      const V H = select(counted, V::load(in.entropy + i), zero);
      entropy = entropy + m * H;
      value = value - entropy_coef * H;
    }
    loss = loss + m * value;
    if ((i / V::W + 1) % 32 == 0) {  // short chains, whatever the width
      total += sum(loss);
      loss = zero;
    }
    if (grad) select(counted, m * weight * slope, zero).store(grad + i);
    if (grad_entropy) (zero - m * weight * entropy_coef).store(grad_entropy + i);
    tokens = tokens + m;
    low = low + m * l, high = high + m * h, dual = dual + m * c;
    ratio = ratio + m * r;
    ratio_min = select(counted, min(r, ratio_min), ratio_min);
    ratio_max = select(counted, max(r, ratio_max), ratio_max);
    correction = correction + m * w;
  }
  sums.loss += (total + sum(loss)) * plan.weight;
  sums.low += sum(low), sums.high += sum(high), sums.dual += sum(dual), sums.ratio += sum(ratio), sums.k1 += sum(k1);
  sums.k3 += sum(k3), sums.ref_kl += sum(ref_kl), sums.entropy += sum(entropy), sums.mismatch += sum(mismatch);
  sums.correction += sum(correction);
  const double count = sum(tokens);
  sums.corrected += tokenwise ? sum(corrected) : plan.correction != plan.uncorrected ? count : 0;
  sums.tokens += count;
  const double least = lowest(ratio_min), most = highest(ratio_max), worst = highest(mismatch_max);
  if (least < sums.ratio_min) sums.ratio_min = least;
  if (most > sums.ratio_max) sums.ratio_max = most;
  if (worst > sums.mismatch_max) sums.mismatch_max = worst;
}

template <class T>
void dispatch_chunk(const PolicyArgs& a, const RowPlan& plan, const Inputs<T>& in, int64_t n, T* grad, T* grad_entropy, Sums& sums) {
  switch (a.kind) {
    case PolicyKind::ppo: return chunk_loss<PolicyKind::ppo>(a, plan, in, n, grad, grad_entropy, sums);
    case PolicyKind::reinforce: return chunk_loss<PolicyKind::reinforce>(a, plan, in, n, grad, grad_entropy, sums);
    case PolicyKind::cispo: return chunk_loss<PolicyKind::cispo>(a, plan, in, n, grad, grad_entropy, sums);
    case PolicyKind::sapo: return chunk_loss<PolicyKind::sapo>(a, plan, in, n, grad, grad_entropy, sums);
    case PolicyKind::gspo: return chunk_loss<PolicyKind::gspo>(a, plan, in, n, grad, grad_entropy, sums);
    case PolicyKind::gmpo: return chunk_loss<PolicyKind::gmpo>(a, plan, in, n, grad, grad_entropy, sums);
  }
}

template <class T>
void policy_loss_as(const PolicyArgs& a) {
  const Rows& rows = a.rows;
  const Units units(rows);
  const int workers = worthwhile(a.threads, rows.total());
  Scratch<Chunk<T>> chunks(workers, Uninitialized{});
  Scratch<RowPart> parts(units.size());
  Scratch<Sums> sums(units.size());
  Scratch<RowPlan> plans(rows.count);
  const bool only_counts = a.kind != PolicyKind::gspo && a.kind != PolicyKind::gmpo &&
                           (a.correction == Correction::none || a.correction_level == CorrectionLevel::token);
  parallel_for(units.size(), workers, [&](int64_t u, int worker) {
    const Unit unit = units[u];
    if (only_counts && !a.mask) { parts[u].tokens = static_cast<double>(unit.size); return; }
    for (int64_t t = unit.begin, end = unit.begin + unit.size; t < end; t += chunk_size) {
      const int64_t n = end - t < chunk_size ? end - t : chunk_size;
      Inputs<T> in{};
      if (only_counts) in.mask = fetch_mask<T>(a.mask, rows, unit.row, t, n, chunks[worker].mask);
      else in = read(a, unit.row, t, n, chunks[worker]);
      parts[u].add(row_part(a, in, n));
    }
  });
  Scratch<RowPart> row_parts(rows.count);
  Totals totals;
  for (int64_t u = 0; u < units.size(); ++u) row_parts[units[u].row].add(parts[u]);
  for (int64_t b = 0; b < rows.count; ++b) {
    totals.tokens += row_parts[b].tokens;
    totals.sequences += row_parts[b].tokens != 0;
  }
  for (int64_t b = 0; b < rows.count; ++b) plans[b] = close_row(a, row_parts[b], totals);
  parallel_for(units.size(), workers, [&](int64_t u, int worker) {
    const Unit unit = units[u];
    Chunk<T>& c = chunks[worker];
    Sums local;
    for (int64_t t = unit.begin, end = unit.begin + unit.size; t < end; t += chunk_size) {
      const int64_t n = end - t < chunk_size ? end - t : chunk_size, at = rows.start(unit.row) + t;
      T* to = a.grad_logprobs ? static_cast<T*>(a.grad_logprobs) + at : nullptr;
      T* to_entropy = a.grad_entropy ? static_cast<T*>(a.grad_entropy) + at : nullptr;
      T* grad = to ? output(to, n, c.grad) : nullptr;
      T* grad_entropy = to_entropy ? output(to_entropy, n, c.grad_entropy) : nullptr;
      dispatch_chunk(a, plans[unit.row], read(a, unit.row, t, n, c), n, grad, grad_entropy, local);
      if (to) finish_output(to, grad, n);
      if (to_entropy) finish_output(to_entropy, grad_entropy, n);
    }
    sums[u] = local;
  });
  Sums all;
  for (int64_t u = 0; u < units.size(); ++u) {
    const Sums& s = sums[u];
    all.loss += s.loss, all.low += s.low, all.high += s.high, all.dual += s.dual, all.ratio += s.ratio, all.k1 += s.k1;
    all.k3 += s.k3, all.ref_kl += s.ref_kl, all.entropy += s.entropy, all.tokens += s.tokens, all.mismatch += s.mismatch;
    all.correction += s.correction, all.corrected += s.corrected;
    if (s.ratio_min < all.ratio_min) all.ratio_min = s.ratio_min;
    if (s.ratio_max > all.ratio_max) all.ratio_max = s.ratio_max;
    if (s.mismatch_max > all.mismatch_max) all.mismatch_max = s.mismatch_max;
  }
  const bool any = all.tokens != 0;
  const double over = any ? 1 / all.tokens : 0;
  double* r = a.result;
  *r++ = any ? all.loss : 0;
  *r++ = all.low * over;
  *r++ = all.high * over;
  *r++ = all.dual * over;
  *r++ = all.ratio * over;
  *r++ = any ? all.ratio_min : 0;
  *r++ = any ? all.ratio_max : 0;
  *r++ = all.k1 * over;
  *r++ = all.k3 * over;
  *r++ = all.ref_kl * over;
  *r++ = all.entropy * over;
  *r++ = all.tokens;
  *r++ = all.mismatch * over;
  *r++ = all.mismatch_max;
  *r++ = all.correction * over;
  *r++ = all.corrected * over;
}

}  // namespace

void policy_loss(const PolicyArgs& a) { a.f64 ? policy_loss_as<double>(a) : policy_loss_as<float>(a); }

}}  // namespace
