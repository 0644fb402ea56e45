#include "cuda_sm90.h"
#include "fragment.cuh"

// Exponentials that the forward left, into the gradient of the logits, in place: one read and one write, a row a block.

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int exponential_threads = 512;

__global__ void __launch_bounds__(exponential_threads) exponentials_kernel(ExponentialsToGradientArgs g) {
  const LogprobsArgs& a = g.of.linear.forward;
  const int64_t count = counted_rows(g.of.linear);
  const float cap = static_cast<float>(a.softcap);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    bf16* out = static_cast<bf16*>(g.of.exponentials) + row * g.of.stride;
    const GradientRow r = gradient_row(a, g.grad_logprobs, g.grad_entropy, g.grad_lse, row, count);
    // the label's exponent, exactly: (x_y - max) / T in units of log 2
    const float label_u = r.nothing ? 0.f : (static_cast<const float*>(a.logprobs)[row] + static_cast<const float*>(a.log_sum)[row]) * log2e;
    const bool exponent = r.slope != 0 || cap != 0;  // else nobody asks for it
    auto gradient = [&](float e, float shift, float factor, int64_t column) {
      const bool label = column == r.y;
      const float u = label ? label_u : exponent ? log2f(e) + shift : 0.f;
      float d = (label ? exp2_fast(u) : e * factor) * fmaf(fmaxf(u, -200.f), r.slope, r.constant);
      if (label) d += r.at_label;
      if (cap != 0 && d != 0) {
        const float t = (r.max + u / r.c) / cap;
        d *= 1 - t * t;
      }
      return d;
    };
    for (int64_t at = threadIdx.x * chunk<bf16>; at < a.vocab; at += exponential_threads * chunk<bf16>) {
      const float shift = r.nothing ? 0.f : (g.of.references[at / VocabSplit::tile * a.rows + row] - r.max) * r.c;
      const float factor = exp2_fast(shift);
      bf16 s[chunk<bf16>];
      if (at + chunk<bf16> <= a.vocab) {
        Bytes16 bytes = load_plain(out + at);
        memcpy(s, &bytes, 16);
#pragma unroll
        for (int i = 0; i < chunk<bf16>; ++i) round_to(r.nothing ? 0.f : gradient(to_float(s[i]), shift, factor, at + i), s[i]);
        memcpy(&bytes, s, 16);
        *reinterpret_cast<Bytes16*>(out + at) = bytes;
      } else {
        for (int64_t i = at; i < a.vocab; ++i) round_to(r.nothing ? 0.f : gradient(to_float(out[i]), shift, factor, i), out[i]);
      }
    }
  }
}

}}}  // namespace

namespace fastrlhf { namespace cuda {

using namespace FASTRLHF_ISA;

int linear_logprobs_exponentials_to_gradient(const ExponentialsToGradientArgs& g, const Launch& l) {
  const int64_t rows = g.of.linear.forward.rows, resident = static_cast<int64_t>(processors()) * (2048 / exponential_threads);
  return launch(exponentials_kernel, {rows < resident ? rows : resident, exponential_threads}, static_cast<cudaStream_t>(l.stream), g);
}

}}  // namespace
