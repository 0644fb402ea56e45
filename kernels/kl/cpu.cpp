#include "cpu.h"

#include <initializer_list>

#include "common/kl_math.h"
#include "common/online_softmax.h"
#include "common/tokens.h"

namespace fastrlhf { namespace FASTRLHF_ISA {
namespace {

template <class T>
void kl_as(const KlArgs& a) {
  using V = typename VectorOf<T>::type;
  const Units units(a.rows);
  struct Chunk { Buffer<T> logprobs, ref, grad, out; };
  const int workers = worthwhile(a.threads, a.rows.total());
  Scratch<Chunk> chunks(workers, Uninitialized{});
  const Array grad{a.grad, a.f64 ? DType::f64 : DType::f32, a.rows.length, 1, false};
  const V input_bound = V::set(static_cast<T>(a.clamp_input)), output_bound = V::set(static_cast<T>(a.clamp_output));
  const auto kind = static_cast<KlKind>(a.kind);
  parallel_for(units.size(), workers, [&](int64_t u, int worker) {
    Chunk& c = chunks[worker];
    const Unit unit = units[u];
    for (int64_t t = unit.begin, end = unit.begin + unit.size; t < end; t += chunk_size) {
      const int64_t n = end - t < chunk_size ? end - t : chunk_size;
      const T* logprobs = fetch<T>(a.logprobs, a.rows, unit.row, t, n, c.logprobs);
      const T* ref = fetch<T>(a.ref_logprobs, a.rows, unit.row, t, n, c.ref);
      const T* g = grad ? fetch<T>(grad, a.rows, unit.row, t, n, c.grad) : nullptr;
      T* to = static_cast<T*>(a.out) + a.rows.start(unit.row) + t;
      T* out = output(to, n, c.out);
      for (int64_t i = 0; i < n; i += V::W) {
        V value, slope;
        kl_clamped(kind, V::load(logprobs + i) - V::load(ref + i), input_bound, output_bound, a.straight_through, value, slope);
        (g ? V::load(g + i) * slope : value).store(out + i);
      }
      finish_output(to, out, n);
    }
  });
}

// log((e^a + e^b) / 2) for log-probabilities a, b, of which at most one is -inf.
template <class V>
V log_average(V a, V b) {
  const V high = max(a, b), low = min(a, b), one = V::set(1);
  const V e = exp(low - high);                      // in [0, 1]
  return high + log_1_to_2(one + e) - V::set(static_cast<typename V::T>(0.6931471805599453));
}

// Both rows' softmaxes: log p_i = (x_i - max) / T - log_sum. Each row is read from memory once; what follows finds it
// in the second-level cache.
template <class T>
struct Softmax {
  T max = 0;
  double log_sum = 0;

  template <class V>
  V log_probability(V x, V scale) const { return (x - V::set(max)) * scale - V::set(static_cast<T>(log_sum)); }
};

// A row of logits or of their gradient, of any dtype that is computed in T. What depends on the dtype is here, and not inlined:
// the ops below are compiled once for all of them.
template <class T>
struct Row {
  const Matrix& matrix;
  int64_t start;

  Row(const Matrix& m, int64_t row) : matrix(m), start(m.offset(row)) {}

  [[gnu::noinline]] Softmax<T> softmax(int64_t n, double scale, T* buffer) const {
    RowStats<T> stats;
    with_type_of<T>(matrix.dtype, [&](auto s) { stats = plain_row_stats<false>(at<decltype(s)>(0), n, scale, buffer); });
    return {stats.max, std::log(stats.sum)};
  }
  // [begin, begin + n) as T, -inf up to whole pairs of vectors; returns that size.
  [[gnu::noinline]] int64_t read(int64_t begin, int64_t n, T* buffer) const {
    int64_t size = 0;
    with_type_of<T>(matrix.dtype, [&](auto s) { size = stage(at<decltype(s)>(begin), n, 0, nullptr, buffer); });
    return size;
  }
  [[gnu::noinline]] void write(int64_t begin, const T* from, int64_t n, bool past_cache) const {
    with_type_of<T>(matrix.dtype, [&](auto s) { write_row(at<decltype(s)>(begin), from, n, past_cache); });
  }
  void clear(int64_t n) const { std::memset(static_cast<char*>(matrix.data) + start * element_size(matrix.dtype), 0, n * element_size(matrix.dtype)); }

 private:
  template <class S>
  S* at(int64_t i) const { return static_cast<S*>(matrix.data) + start + i; }
};

// p log(p / q), 0 where p is 0. Where only q is 0 that is +inf, as it should be.
template <class V>
V divergence_term(V log_p, V log_q) {
  const V zero = V::set(0), p = exp(log_p);
  return select(p > zero, p * (log_p - log_q), select(p <= zero, zero, p));
}

template <class T>
struct Pair {  // a block of both rows as T
  Buffer<T> logits[block_size / chunk_size], ref[block_size / chunk_size], grad[block_size / chunk_size], grad_ref[block_size / chunk_size];
};

template <class T>
void kl_full_forward_as(const KlFullArgs& a) {
  using V = typename VectorOf<T>::type;
  const int workers = worthwhile(a.threads, a.rows * a.vocab);
  Scratch<Pair<T>> pairs(workers, Uninitialized{});
  const double scale = 1 / a.temperature;
  parallel_for(a.rows, workers, [&](int64_t row, int worker) {
    T unwanted[4];
    T* stats = a.stats ? static_cast<T*>(a.stats) + 4 * row : unwanted;
    T& out = static_cast<T*>(a.out)[row];
    if (a.mask && !a.mask[row]) {
      out = stats[0] = stats[1] = stats[2] = stats[3] = 0;
      return;
    }
    T* x = pairs[worker].logits[0].data;
    T* y = pairs[worker].ref[0].data;
    const Row<T> logits(a.logits, row), ref(a.ref_logits, row);
    const Softmax<T> p = logits.softmax(a.vocab, scale, x), q = ref.softmax(a.vocab, scale, x);
    stats[0] = p.max, stats[1] = static_cast<T>(p.log_sum), stats[2] = q.max, stats[3] = static_cast<T>(q.log_sum);
    const V s = V::set(static_cast<T>(scale));
    double total = 0;
    for (int64_t begin = 0; begin < a.vocab; begin += block_size) {
      const int64_t n = a.vocab - begin < block_size ? a.vocab - begin : block_size;
      const int64_t size = logits.read(begin, n, x);
      ref.read(begin, n, y);
      V sums = V::set(0);
      for (int64_t i = 0; i < size; i += V::W) {
        const V lp = p.log_probability(V::load(x + i), s), lq = q.log_probability(V::load(y + i), s);
        switch (a.direction) {
          case KlDirection::forward: sums = sums + divergence_term(lq, lp); break;
          case KlDirection::reverse: sums = sums + divergence_term(lp, lq); break;
          case KlDirection::js: {
            const V lm = log_average(lp, lq);
            sums = sums + (divergence_term(lp, lm) + divergence_term(lq, lm)) * V::set(T(0.5));
          }
        }
      }
      total += sum(sums);
    }
    out = static_cast<T>(total);
  });
}

// With P, Q the distributions of logits and ref_logits, L = log(P/Q), M their average:
//   forward KL(Q||P):  d/dx = P - Q                    d/dy = Q (-L - KL)
//   reverse KL(P||Q):  d/dx = P (L - KL)               d/dy = Q - P
//   js:                d/dx = P (log(P/M) - KL(P||M))/2  d/dy = Q (log(Q/M) - KL(Q||M))/2
template <class T>
void kl_full_backward_as(const KlFullArgs& a) {
  using V = typename VectorOf<T>::type;
  const int workers = worthwhile(a.threads, a.rows * a.vocab);
  Scratch<Pair<T>> pairs(workers, Uninitialized{});
  const double scale = 1 / a.temperature;
  const bool past_cache = a.rows * a.vocab * element_size(a.logits.dtype) > (int64_t{16} << 20);
  parallel_for(a.rows, workers, [&](int64_t row, int worker) {
    const Row<T> dx(a.grad_logits, row), dy(a.grad_ref_logits, row);
    const double g = static_cast<const T*>(a.grad)[row];
    if (g == 0 || (a.mask && !a.mask[row])) {
      for (const Row<T>& d : {dx, dy}) if (d.matrix.data) d.clear(a.vocab);
      return;
    }
    T* x = pairs[worker].logits[0].data;
    T* y = pairs[worker].ref[0].data;
    T* gx = pairs[worker].grad[0].data;
    T* gy = pairs[worker].grad_ref[0].data;
    const Row<T> logits(a.logits, row), ref(a.ref_logits, row);
    const T* stats = static_cast<const T*>(a.stats) + 4 * row;
    const Softmax<T> p{stats[0], stats[1]}, q{stats[2], stats[3]};
    const V s = V::set(static_cast<T>(scale)), zero = V::set(0);
    auto log_probabilities = [&](int64_t i, V& lp, V& lq) {
      lp = p.log_probability(V::load(x + i), s);
      lq = q.log_probability(V::load(y + i), s);
    };
    auto blocks = [&](auto&& body) {
      for (int64_t begin = 0; begin < a.vocab; begin += block_size) {
        const int64_t n = a.vocab - begin < block_size ? a.vocab - begin : block_size;
        const int64_t size = logits.read(begin, n, x);
        ref.read(begin, n, y);
        body(begin, n, size);
      }
    };
    double from_p = static_cast<const T*>(a.out)[row], from_q = from_p;  // the divergences that the gradients centre on
    if (a.direction == KlDirection::js) {
      from_p = from_q = 0;
      blocks([&](int64_t, int64_t, int64_t size) {
        V sp = zero, sq = zero, lp, lq;
        for (int64_t i = 0; i < size; i += V::W) {
          log_probabilities(i, lp, lq);
          const V lm = log_average(lp, lq);
          sp = sp + divergence_term(lp, lm);
          sq = sq + divergence_term(lq, lm);
        }
        from_p += sum(sp);
        from_q += sum(sq);
      });
    }
    const V kp = V::set(static_cast<T>(from_p)), kq = V::set(static_cast<T>(from_q));
    const V factor = V::set(static_cast<T>(g * scale * (a.direction == KlDirection::js ? 0.5 : 1)));
    blocks([&](int64_t begin, int64_t n, int64_t size) {
      V lp, lq;
      for (int64_t i = 0; i < size; i += V::W) {
        log_probabilities(i, lp, lq);
        const V P = exp(lp), Q = exp(lq);
        V ax, ay;
        if (a.direction == KlDirection::forward) {
          ax = P - Q;
          ay = select(Q > zero, Q * (lq - lp - kq), zero);
        } else if (a.direction == KlDirection::reverse) {
          ax = select(P > zero, P * (lp - lq - kp), zero);
          ay = Q - P;
        } else {
          const V lm = log_average(lp, lq);
          ax = select(P > zero, P * (lp - lm - kp), zero);
          ay = select(Q > zero, Q * (lq - lm - kq), zero);
        }
        (ax * factor).store(gx + i);
        (ay * factor).store(gy + i);
      }
      if (a.grad_logits.data) dx.write(begin, gx, n, past_cache);
      if (a.grad_ref_logits.data) dy.write(begin, gy, n, past_cache);
    });
    if (past_cache) stream_end();
  });
}

}  // namespace

void kl(const KlArgs& a) { with_compute_type(a.f64, [&](auto t) { kl_as<decltype(t)>(a); }); }
void kl_full_forward(const KlFullArgs& a) { with_compute_type(is_f64(a), [&](auto t) { kl_full_forward_as<decltype(t)>(a); }); }
void kl_full_backward(const KlFullArgs& a) { with_compute_type(is_f64(a), [&](auto t) { kl_full_backward_as<decltype(t)>(a); }); }

}}  // namespace
