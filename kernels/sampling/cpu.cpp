#include "cpu.h"

#include "common/online_softmax.h"
#include "common/philox.h"
#include "csrc/scratch.h"
#include "csrc/threads.h"

namespace fastrlhf { namespace FASTRLHF_ISA {
namespace {

// Unsigned keys in the order of the floats.
inline uint32_t key_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline float value_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

constexpr int radix_bits[3] = {11, 11, 10};

// The highest threshold at or above which the elements (of those >= above) weigh `target` or more: radix descent over
// the key's bits, a histogram of weights at each level. Neither top-k (weights 1) nor top-p (weights e^x) needs a sort.
template <class Weight>
float weighted_threshold(const float* x, int64_t n, float above, double target, double* histogram, Weight&& weight) {
  uint32_t prefix = 0, mask = 0;
  const uint32_t least = key_of(above);
  double reached = 0;
  int shift = 32;
  for (const int bits : radix_bits) {
    const int buckets = 1 << bits;
    shift -= bits;
    for (int i = 0; i < buckets; ++i) histogram[i] = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(x[i]);
      if (key >= least && (key & mask) == prefix) histogram[(key >> shift) & (buckets - 1)] += weight(i);
    }
    int found = -1;  // the lowest bucket with any weight, unless the target is reached before
    for (int bucket = buckets - 1; bucket >= 0; --bucket) {
      if (histogram[bucket] == 0) continue;
      if (found >= 0) reached += histogram[found];
      found = bucket;
      if (reached + histogram[bucket] >= target) break;
    }
    if (found < 0) return above;
    prefix |= static_cast<uint32_t>(found) << shift;
    mask |= static_cast<uint32_t>(buckets - 1) << shift;
  }
  return value_of(prefix);
}

// The row as float, and e^((x - top) / T) of it. -inf and zeros past n.
struct Space {
  int64_t padded, blocks;
  Scratch<float> logits, weights;
  Scratch<double> histograms, sums;
  Space(int64_t vocab, int workers)
      : padded((vocab + 2 * F32::W - 1) / (2 * F32::W) * (2 * F32::W)), blocks((padded + block_size - 1) / block_size),
        logits(workers * padded, Uninitialized{}), weights(workers * padded, Uninitialized{}), histograms(workers * 2048, Uninitialized{}),
        sums(workers * blocks, Uninitialized{}) {}
};

// n in whole vectors.
bool holds_nan(const float* x, int64_t n) {
  const F32 zero = F32::set(0), one = F32::set(1);
  F32 found = zero;
  for (int64_t i = 0; i < n; i += F32::W) {
    const F32 v = F32::load(x + i);
    found = max(found, select(v != v, one, zero));
  }
  return highest(found) != 0;
}

template <class S>
float load_row(const S* from, int64_t n, int64_t padded, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(to_compute(from[i]));
  for (int64_t i = n; i < padded; ++i) to[i] = -INFINITY;
  return highest_of(to, padded);
}

// Sums of blocks and of the row, of the elements at or above the threshold; the others' weights become 0.
double keep_and_sum(const float* x, float* w, int64_t padded, float threshold, double* blocks) {
  double total = 0;
  const F32 limit = F32::set(threshold), zero = F32::set(0);
  for (int64_t b = 0; b < padded; b += block_size) {
    F32 s = zero;
    const int64_t end = padded - b < block_size ? padded : b + block_size;
    for (int64_t i = b; i < end; i += F32::W) {
      const F32 v = select(F32::load(x + i) >= limit, F32::load(w + i), zero);
      v.store(w + i);
      s = s + v;
    }
    total += blocks[b / block_size] = sum(s);
  }
  return total;
}

// The first element whose cumulative weight passes `goal`.
int64_t walk(const float* w, int64_t padded, const double* blocks, double goal) {
  int64_t b = 0, last = -1;
  double before = 0;
  for (int64_t i = 0; i * block_size < padded; ++i) {
    if (blocks[i] == 0) continue;
    b = last = i;
    if (before + blocks[i] > goal) break;
    before += blocks[i];
  }
  if (last < 0) return -1;
  double passed = before;
  int64_t token = -1;
  for (int64_t i = b * block_size; i < (b + 1) * block_size && i < padded; ++i) {
    if (w[i] == 0) continue;
    token = i;
    passed += w[i];
    if (passed > goal) break;
  }
  return token;
}

template <class S>
void sample_as(const SampleArgs& a) {
  const int workers = worthwhile(a.threads, a.rows * a.vocab);
  const Space space(a.vocab, workers);
  parallel_for(a.rows, workers, [&](int64_t row, int worker) {
    const int64_t n = a.vocab, padded = space.padded;
    float* x = space.logits.get() + worker * padded;
    float* w = space.weights.get() + worker * padded;
    double* histogram = space.histograms.get() + worker * 2048;
    double* blocks = space.sums.get() + worker * space.blocks;
    const float top = load_row(static_cast<const S*>(a.logits.data) + a.logits.offset(row), n, padded, x);
    auto finish = [&](int64_t token, double logprob, float threshold, int64_t kept) {
      a.tokens[row] = token;
      if (a.logprobs) static_cast<float*>(a.logprobs)[row] = static_cast<float>(logprob);
      if (a.thresholds) static_cast<float*>(a.thresholds)[row] = threshold;
      if (a.kept_counts) a.kept_counts[row] = kept;
    };
    if (!std::isfinite(top) || holds_nan(x, padded)) return finish(-1, NAN, top, 0);  // the caller raises
    const double temperature = a.temperatures ? a.temperatures[row] : a.temperature;
    const double top_p = a.top_ps ? a.top_ps[row] : a.top_p, min_p = a.min_ps ? a.min_ps[row] : a.min_p;
    const int64_t top_k = a.top_ks ? a.top_ks[row] : a.top_k;
    if (temperature == 0) {
      int64_t best = 0, ties = 0;
      while (x[best] != top) ++best;
      for (int64_t i = 0; i < n; ++i) ties += x[i] == top;
      return finish(best, 0, top, ties);
    }
    const double scale = 1 / temperature;
    const F32 m = F32::set(top), c = F32::set(static_cast<float>(scale * log2e));
    for (int64_t i = 0; i < padded; i += F32::W) exp2((F32::load(x + i) - m) * c).store(w + i);
    float threshold = -INFINITY;
    if (top_k > 0 && top_k < n)
      threshold = weighted_threshold(x, n, threshold, static_cast<double>(top_k), histogram, [](int64_t) { return 1.0; });
    double total = keep_and_sum(x, w, padded, threshold, blocks);
    if (top_p < 1) {
      const float nucleus = weighted_threshold(x, n, threshold, top_p * total, histogram, [&](int64_t i) { return w[i]; });
      if (nucleus > threshold) threshold = nucleus;
    }
    if (min_p > 0) {
      const double least = top + std::log(min_p) * temperature;
      float limit = static_cast<float>(least);
      if (limit < least) limit = std::nextafter(limit, INFINITY);
      if (limit > threshold) threshold = limit;
    }
    if (top_p < 1 || min_p > 0) total = keep_and_sum(x, w, padded, threshold, blocks);
    const uint64_t seed = static_cast<uint64_t>(a.seeds ? a.seeds[row] : a.seed);
    const double goal = philox_uniform(seed, a.seeds ? 0 : static_cast<uint64_t>(row)) * total;
    const int64_t token = walk(w, padded, blocks, goal);
    int64_t kept = 0;
    if (a.kept_counts) for (int64_t i = 0; i < n; ++i) kept += x[i] >= threshold && x[i] > -INFINITY;
    finish(token, (static_cast<double>(x[token]) - top) * scale - std::log(total), threshold, kept);
  });
}

template <class S>
void kept_indices_as(const KeptArgs& a) {
  parallel_for(a.rows, worthwhile(a.threads, a.rows * a.vocab), [&](int64_t row, int) {
    const S* logits = static_cast<const S*>(a.logits.data) + a.logits.offset(row);
    const float threshold = static_cast<const float*>(a.thresholds)[row];
    int64_t at = a.indptr[row];
    for (int64_t i = 0; i < a.vocab; ++i) {
      const float x = static_cast<float>(to_compute(logits[i]));
      if (x >= threshold && x > -INFINITY) a.indices[at++] = i;
    }
  });
}

}  // namespace

void sample(const SampleArgs& a) { with_float_type(a.logits.dtype, [&](auto s) { sample_as<decltype(s)>(a); }); }
void kept_indices(const KeptArgs& a) { with_float_type(a.logits.dtype, [&](auto s) { kept_indices_as<decltype(s)>(a); }); }

}}  // namespace
