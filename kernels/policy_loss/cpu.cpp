#include "cpu.h"

#include "common/tokens.h"
#include "math.h"

namespace fastrlhf { namespace FASTRLHF_ISA {
namespace {

// Two phases over units of a row. The first counts tokens and, for what depends on a whole sequence, sums it; rows are
// then closed in order; the second computes losses, gradients and statistics.

template <class T>
struct Chunk {
  Buffer<T> logprobs, old, advantages, mask, rollout, ref, entropy, grad, grad_entropy;
};

template <class T>
struct Inputs {
  const T *logprobs, *old, *advantages, *mask, *rollout, *ref, *entropy;
};

template <class V>
Token<V> token_at(const Inputs<typename V::T>& in, int64_t i) {
  auto maybe = [&](const typename V::T* x) { return x ? V::load(x + i) : V::set(0); };
  return {V::load(in.mask + i), maybe(in.logprobs), maybe(in.old), maybe(in.advantages), maybe(in.rollout), maybe(in.ref), maybe(in.entropy)};
}

template <class T>
Inputs<T> read(const PolicyArgs& a, int64_t b, int64_t t, int64_t n, Chunk<T>& c) {
  auto maybe = [&](const Array& x, Buffer<T>& buffer) { return x ? fetch<T>(x, a.rows, b, t, n, buffer) : nullptr; };
  return {fetch<T>(a.logprobs, a.rows, b, t, n, c.logprobs), fetch<T>(a.old_logprobs, a.rows, b, t, n, c.old),
          fetch<T>(a.advantages, a.rows, b, t, n, c.advantages), fetch_mask<T>(a.mask, a.rows, b, t, n, c.mask),
          maybe(a.rollout_logprobs, c.rollout), maybe(a.ref_logprobs, c.ref), maybe(a.entropy, c.entropy)};
}

template <class T>
RowPart row_part(const PolicyArgs& a, const Inputs<T>& in, int64_t n) {
  using V = typename VectorOf<T>::type;
  RowSums<V> sums;
  for (int64_t i = 0; i < n; i += V::W) sums.add(a, token_at<V>(in, i));
  RowPart part;
  part.tokens = sum(sums.tokens), part.log_ratio = sum(sums.log_ratio), part.clipped_log_ratio = sum(sums.clipped);
  part.positive = sum(sums.positive), part.negative = sum(sums.negative), part.advantage = sum(sums.advantage);
  part.weight = sum(sums.weights), part.mismatch = sum(sums.mismatch);
  return part;
}

// `weight`: of the row's tokens in the loss, with the share in it.
template <PolicyKind kind, class T>
void chunk_loss(const PolicyArgs& a, const RowPlan& plan, double weight, const Inputs<T>& in, int64_t n, T* grad, T* grad_entropy, PolicySums& all) {
  using V = typename VectorOf<T>::type;
  const V zero = V::set(0), w = V::set(static_cast<T>(weight)), entropy_coef = V::set(static_cast<T>(a.entropy_coef));
  TokenSums<V> sums;
  double total = 0;
  for (int64_t i = 0; i < n; i += V::W) {
    const Token<V> token = token_at<V>(in, i);
    const V slope = sums.template add<kind>(a, plan, token);
    if ((i / V::W + 1) % 32 == 0) {  // short chains, whatever the width
      total += sum(sums.loss);
      sums.loss = zero;
    }
    if (grad) select(token.mask != zero, token.mask * w * slope, zero).store(grad + i);
    if (grad_entropy) (zero - token.mask * w * entropy_coef).store(grad_entropy + i);
  }
  PolicySums chunk;
  const V each[PolicySums::added] = {sums.loss, sums.low, sums.high, sums.dual, sums.ratio, sums.k1, sums.k3, sums.ref_kl, sums.entropy,
                                     sums.tokens, sums.mismatch, sums.correction, sums.corrected};
  for (int i = 0; i < PolicySums::added; ++i) chunk.at[i] = sum(each[i]);
  chunk.at[0] = (total + chunk.at[0]) * plan.weight;
  chunk.at[13] = lowest(sums.ratio_min), chunk.at[14] = highest(sums.ratio_max), chunk.at[15] = highest(sums.mismatch_max);
  all.add(chunk);
}

template <class T>
void policy_loss_as(const PolicyArgs& a) {
  const Rows& rows = a.rows;
  const Units units(rows);
  const int workers = worthwhile(a.threads, rows.total());
  Scratch<Chunk<T>> chunks(workers, Uninitialized{});
  Scratch<RowPart> parts(units.size());
  Scratch<PolicySums> sums(units.size());
  Scratch<RowPlan> plans(rows.count);
  const bool only_counts = !by_sequence(a.kind) && !corrects_sequences(a);
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
  for (int64_t b = 0; b < rows.count; ++b) plans[b] = close_row(a, row_parts[b]);
  const double share = share_of(a.reduction, a.denominator, totals, rows.length);
  parallel_for(units.size(), workers, [&](int64_t u, int worker) {
    const Unit unit = units[u];
    Chunk<T>& c = chunks[worker];
    const RowPlan& plan = plans[unit.row];
    PolicySums local;
    for (int64_t t = unit.begin, end = unit.begin + unit.size; t < end; t += chunk_size) {
      const int64_t n = end - t < chunk_size ? end - t : chunk_size, at = rows.start(unit.row) + t;
      T* to = a.grad_logprobs ? static_cast<T*>(a.grad_logprobs) + at : nullptr;
      T* to_entropy = a.grad_entropy ? static_cast<T*>(a.grad_entropy) + at : nullptr;
      T* grad = to ? output(to, n, c.grad) : nullptr;
      T* grad_entropy = to_entropy ? output(to_entropy, n, c.grad_entropy) : nullptr;
      const Inputs<T> in = read(a, unit.row, t, n, c);
      with_policy_kind(a.kind, [&](auto kind) {
        chunk_loss<decltype(kind)::value>(a, plan, plan.weight * share, in, n, grad, grad_entropy, local);
      });
      if (to) finish_output(to, grad, n);
      if (to_entropy) finish_output(to_entropy, grad_entropy, n);
    }
    sums[u] = local;
  });
  PolicySums all;
  for (int64_t u = 0; u < units.size(); ++u) all.add(sums[u]);
  PolicySums::write(all.at, share, [&](int i, double value) { a.result[i] = value; });
}

}  // namespace

void policy_loss(const PolicyArgs& a) { with_compute_type(a.f64, [&](auto t) { policy_loss_as<decltype(t)>(a); }); }

}}  // namespace
