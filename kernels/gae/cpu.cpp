#include "cpu.h"

#include "common/kl_math.h"
#include "common/scan.h"
#include "common/tokens.h"

namespace fastrlhf { namespace FASTRLHF_ISA {
namespace {

template <class T>
struct Chunk {
  Buffer<T> rewards, values, mask, logprobs, ref, counted, advantages, kl;
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

// gamma lam to the powers that the lanes of a vector of counted tokens need, composed as `compose_right` would.
template <class V>
struct Powers {
  V at_step[7];  // of a lane whose step reaches a lane to its right: gamma lam, squared, squared again, ...
  V carried;     // of what comes from the right of the vector

  explicit Powers(V gl) : carried(gl) {
    V c = gl;
    for (int64_t s = 0, k = 1; k < V::W; ++s, k *= 2, c = c * c) at_step[s] = c;
    V none = V::set(0);
    compose_right<1>(carried, none);
  }
};

template <int k, int s, class V>
inline void scan_counted(V& d, const Powers<V>& powers) {
  if constexpr (k < V::W) {
    d = fma(powers.at_step[s], V::template down<k>(d, V::set(0)), d);
    scan_counted<2 * k, s + 1>(d, powers);
  }
}

// state (nv, g) going left over a counted token: g' = (r + gamma nv - v) + gamma lam g, nv' = v; over a token that does
// not count both pass. As coefficients: nv' = (1 - w) nv + w v, g' = (w gamma lam + 1 - w) g + w (r + gamma nv - v).
// A vector at a time, in registers; one whose tokens all count has the same coefficient everywhere and the same bits.
template <class T>
void advantages(const RolloutArgs& a, int64_t n, const T* rewards, const T* values, const T* mask, double gamma, double lam,
                T& next_value, T& carried, T* out, T* returns, Chunk<T>& c) {
  using V = typename VectorOf<T>::type;
  const V zero = V::set(0), one = V::set(1), g = V::set(static_cast<T>(gamma)), gl = V::set(static_cast<T>(gamma * lam));
  const Powers<V> powers(gl);
  const bool zeroing = a.mask_mode == MaskMode::zero && a.mask, carrying = a.mask_mode == MaskMode::carry && a.mask;
  const int64_t padded = (n + V::W - 1) / V::W * V::W;
  for (int64_t i = padded - V::W; i >= 0; i -= V::W) {
    const bool tail = i + V::W > n;
    V r = V::load(rewards + i), v = V::load(values + i), counted = one;
    const V given = v;
    if (tail) {
      for (int64_t j = 0; j < V::W; ++j) c.counted.data[j] = i + j < n;
      counted = V::load(c.counted.data);
    }
    if (zeroing || carrying) {  // tokens that do not count may hold anything
      const V m = V::load(mask + i);
      if (carrying) counted = select(m != zero, one, zero);
      const V keep = zeroing ? m : counted;
      r = select(m != zero, keep * r, zero);
      v = select(m != zero, keep * v, zero);
    }
    const V right = V::set(next_value);
    V following = v, advantage;  // following: the value carried left of a token
    if (lowest(counted) == 1) {
      advantage = fma(g, V::template down<1>(v, right), r) - v;
      scan_counted<1, 0>(advantage, powers);
      advantage = fma(powers.carried, V::set(carried), advantage);
    } else {
      V passes = one - counted;
      compose_right<1>(passes, following);
      following = fma(passes, right, following);
      const V delta = fma(g, V::template down<1>(following, right), r) - v;
      V coefficient = select(counted != zero, gl, one);
      advantage = select(counted != zero, delta, zero);
      compose_right<1>(coefficient, advantage);
      advantage = fma(coefficient, V::set(carried), advantage);
    }
    next_value = first(following);
    carried = first(advantage);
    const V sum = advantage + (zeroing ? v : given);
    if (!tail) {
      advantage.store(out + i);
      if (returns) sum.store(returns + i);
    } else {
      advantage.store(c.advantages.data);
      finish_output(out + i, c.advantages.data, n - i);
      sum.store(c.advantages.data);
      if (returns) finish_output(returns + i, c.advantages.data, n - i);
    }
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
    auto row_value = [&](const Array& x) { return x ? static_cast<double>(*fetch<T>(x, rows, b, 0, 1, c.counted)) : 0.0; };
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
        const T* x = out;
        if (n % W) {  // a padded copy: outputs end at n
          finish_output(c.advantages.data, out, n);
          for (int64_t i = n; i % W; ++i) c.advantages.data[i] = 0;
          x = c.advantages.data;
        }
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

void rollout(const RolloutArgs& a) { with_compute_type(a.f64, [&](auto t) { rollout_as<decltype(t)>(a); }); }

}}  // namespace
