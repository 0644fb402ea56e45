#include "cpu.h"

#include "common/kl_math.h"
#include "common/scan.h"
#include "common/tokens.h"

namespace fastrlhf { namespace FASTRLHF_ISA {
namespace {

template <class T>
struct Chunk {
  Buffer<T> rewards, values, mask, logprobs, ref, counted, coefficient, delta, next, advantages, returns, kl;
};

// Rewards of a chunk from the KL and, once, the score: it goes to the last counted token, and chunks come from the end.
template <class T>
const T* shape(const RolloutArgs& a, int64_t b, int64_t t, int64_t n, const T* mask, double& score, bool& score_given, Chunk<T>& c) {
  using V = typename VectorOf<T>::type;
  const T* logprobs = fetch<T>(a.logprobs, a.rows, b, t, n, c.logprobs);
  const T* ref = fetch<T>(a.ref_logprobs, a.rows, b, t, n, c.ref);
  const V zero = V::set(0), coef = V::set(static_cast<T>(-a.kl_coef)), bound = V::set(static_cast<T>(a.kl_clip));
  const V unbounded = V::set(INFINITY);
  T* rewards = c.rewards.data;
  for (int64_t i = 0; i < n; i += V::W) {
    const V m = V::load(mask + i), d = V::load(logprobs + i) - V::load(ref + i);
    V value, slope;
    kl_clamped(static_cast<KlKind>(a.kl_kind), d, unbounded, bound, false, value, slope);
    value = select(m != zero, value, zero);
    value.store(c.kl.data + i);
    (coef * value).store(rewards + i);
  }
  for (int64_t i = n - 1; i >= 0 && !score_given; --i)
    if (mask[i] != 0) {
      rewards[i] += static_cast<T>(score);
      score_given = true;
    }
  const int64_t at = a.rows.start(b) + t;
  if (a.shaped) finish_output(static_cast<T*>(a.shaped) + at, rewards, n);
  if (a.kl) finish_output(static_cast<T*>(a.kl) + at, c.kl.data, n);
  return rewards;
}

// state (nv, g) going left over a counted token: g' = (r + gamma nv - v) + gamma lam g, nv' = v; over a token that does
// not count both pass. As coefficients: nv' = (1 - w) nv + w v, g' = (w gamma lam + 1 - w) g + w (r + gamma nv - v).
template <class T>
void advantages(const RolloutArgs& a, int64_t n, const T* rewards, const T* values, const T* mask, double gamma, double lam,
                T& next_value, T& carried, T* out, T* returns, Chunk<T>& c) {
  using V = typename VectorOf<T>::type;
  const V zero = V::set(0), one = V::set(1), g = V::set(static_cast<T>(gamma)), gl = V::set(static_cast<T>(gamma * lam));
  const bool zeroing = a.mask_mode == MaskMode::zero && a.mask, carrying = a.mask_mode == MaskMode::carry && a.mask;
  int64_t padded = (n + V::W - 1) / V::W * V::W;
  T* w = c.counted.data;
  bool gaps = padded != n;
  if (carrying) {
    V all = one;
    for (int64_t i = 0; i < padded; i += V::W) {
      const V counted = select(V::load(mask + i) != zero, one, zero);
      counted.store(w + i);
      all = min(all, counted);
    }
    gaps = gaps || lowest(all) == 0;
  } else {
    for (int64_t i = 0; i < padded; ++i) w[i] = i < n;
  }
  if (zeroing || gaps) {  // tokens that do not count may hold anything
    const T* keep = zeroing ? mask : w;
    for (int64_t i = 0; i < padded; i += V::W) {
      const V k = V::load(keep + i);
      select(k != zero, k * V::load(rewards + i), zero).store(c.rewards.data + i);
      select(k != zero, k * V::load(values + i), zero).store(c.delta.data + i);
    }
    rewards = c.rewards.data;
  }
  const T* counted_values = zeroing || gaps ? c.delta.data : values;
  const T after = next_value;
  const T* following = counted_values;  // [i]: the value carried left of token i
  if (gaps) {
    for (int64_t i = 0; i < padded; i += V::W) (one - V::load(w + i)).store(c.coefficient.data + i);
    suffix_scan(c.coefficient.data, counted_values, c.next.data, padded, next_value);
    following = c.next.data;
  } else {
    next_value = counted_values[0];
  }
  // delta_i takes following[i + 1]
  for (int64_t i = 0; i < padded; i += V::W) {
    const V right = i + V::W < padded ? V::load(following + i + V::W) : V::set(after);
    const V next = V::template down<1>(V::load(following + i), right), counted = V::load(w + i);
    const V delta = fma(g, next, V::load(rewards + i)) - V::load(counted_values + i);
    select(counted != zero, gl, one).store(c.coefficient.data + i);
    select(counted != zero, delta, zero).store(c.advantages.data + i);
  }
  T* to = padded == n ? out : c.advantages.data;
  suffix_scan(c.coefficient.data, c.advantages.data, to, padded, carried);
  finish_output(out, to, n);
  if (returns) {
    const T* added = zeroing ? c.delta.data : values;
    T* sums = padded == n ? returns : c.returns.data;
    for (int64_t i = 0; i < padded; i += V::W) (V::load(to + i) + V::load(added + i)).store(sums + i);
    finish_output(returns, sums, n);
  }
}

template <class T>
void rollout_as(const RolloutArgs& a) {
  const Rows& rows = a.rows;
  const int workers = worthwhile(a.threads, rows.total());
  Scratch<Chunk<T>> chunks(workers, Uninitialized{});
  Scratch<Moments> moments(a.whiten ? rows.count : 0);
  Buffer<T> nothing{};
  parallel_for(rows.count, workers, [&](int64_t b, int worker) {
    Chunk<T>& c = chunks[worker];
    const int64_t size = rows.size(b);
    auto row_value = [&](const Array& x) { return x ? static_cast<double>(*fetch<T>(x, rows, b, 0, 1, c.next)) : 0.0; };
    double score = row_value(a.scores);
    if (score > a.score_clip) score = a.score_clip;
    if (score < -a.score_clip) score = -a.score_clip;
    bool score_given = false;
    T next_value = static_cast<T>(row_value(a.bootstrap)), carried = 0;
    const double lam = a.lams ? a.lams[b] : a.lam;
    for (int64_t t = (size - 1) / chunk_size * chunk_size; t >= 0 && size > 0; t -= chunk_size) {
      const int64_t n = size - t < chunk_size ? size - t : chunk_size;
      const T* mask = fetch_mask<T>(a.mask, rows, b, t, n, c.mask);
      const T* rewards = a.rewards ? fetch<T>(a.rewards, rows, b, t, n, c.rewards) : shape(a, b, t, n, mask, score, score_given, c);
      if (!a.advantages) continue;
      const T* values = a.values ? fetch<T>(a.values, rows, b, t, n, c.values) : nothing.data;
      const int64_t at = rows.start(b) + t;
      T* out = static_cast<T*>(a.advantages) + at;
      advantages(a, n, rewards, values, mask, a.gamma, lam, next_value, carried, out,
                 a.returns ? static_cast<T*>(a.returns) + at : nullptr, c);
      if (a.whiten) {
        const int64_t W = VectorOf<T>::type::W;
        const T* x = n % W ? c.advantages.data : out;  // padded copy: outputs end at n
        T* weights = c.counted.data;
        for (int64_t i = 0; i < (n + W - 1) / W * W; ++i) weights[i] = i < n && mask[i] != 0;
        moments[b].merge(chunk_moments(x, weights, n));
      }
    }
  });
  if (!a.whiten) return;
  Moments all;
  for (int64_t b = 0; b < rows.count; ++b) all.merge(moments[b]);
  const double variance = all.n > 1 ? all.m2 / (all.n - 1) : 0;
  parallel_for(rows.count, workers, [&](int64_t b, int worker) {
    for (int64_t t = 0, size = rows.size(b); t < size; t += chunk_size) {
      const int64_t n = size - t < chunk_size ? size - t : chunk_size;
      T* x = static_cast<T*>(a.advantages) + rows.start(b) + t;
      const T* mask = fetch_mask<T>(a.mask, rows, b, t, n, chunks[worker].mask);
      standardize_chunk(x, mask, x, n, all.mean, 1 / std::sqrt(variance + 1e-8), 0.0, chunks[worker].advantages);
    }
  });
}

}  // namespace

void rollout(const RolloutArgs& a) {
  if (a.f64) rollout_as<double>(a);
  else rollout_as<float>(a);
}

}}  // namespace
