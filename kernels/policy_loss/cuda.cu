#include "cuda.h"

#include "common/cuda/tokens.cuh"
#include "math.h"

// One launch. The divisor is not known before every mask has been read, so gradients are stored without it; the last block adds
// what all found, in order, and leaves loss, statistics and 1 / divisor; the backward is one multiplication.
//
// Kinds that need nothing of a whole row, with a reduction over tokens, take units of all tokens; else a block takes a row, and
// what needs sums over the row reads it twice, the second time from cache.

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int partial_size = PolicySums::size + 1;  // and the row's weighted tokens: is it a sequence

struct TokenGroup {
  float logprob[group], old[group], advantage[group], mask[group], rollout[group], ref[group], entropy[group];

  __device__ __forceinline__ TokenGroup(const PolicyArgs& a, const Place& place, int64_t t, int n) {
    place.load_mask(a.mask, t, n, mask);
    place.load(a.logprobs, t, n, logprob);
    place.load(a.old_logprobs, t, n, old);
    place.load(a.advantages, t, n, advantage);
    if (a.rollout_logprobs) place.load(a.rollout_logprobs, t, n, rollout);
    if (a.ref_logprobs) place.load(a.ref_logprobs, t, n, ref);
    if (a.entropy) place.load(a.entropy, t, n, entropy);
  }
  __device__ __forceinline__ Token<Lane> operator[](int i) const {
    return {{mask[i]}, {logprob[i]}, {old[i]}, {advantage[i]}, {rollout[i]}, {ref[i]}, {entropy[i]}};
  }
};

__device__ __forceinline__ double reduce_policy(int i, double x, double y) {
  if (i == 13) return y < x ? y : x;
  if (i >= 14 && i < PolicySums::size) return y > x ? y : x;
  return x + y;
}

template <PolicyKind kind>
__device__ __forceinline__ void add_tokens(const PolicyArgs& a, const Place& place, const RowPlan& plan, int64_t begin, int64_t end, TokenSums<Lane>& sums) {
  const float weight = static_cast<float>(plan.weight), entropy_coef = static_cast<float>(a.entropy_coef);
  for (int64_t t = begin + threadIdx.x * group; t < end; t += unit_threads * group) {
    const int n = end - t < group ? static_cast<int>(end - t) : group;
    const TokenGroup tokens(a, place, t, n);
    float grad[group], grad_entropy[group];
#pragma unroll
    for (int i = 0; i < group; ++i) {
      const Token<Lane> token = tokens[i];  // past the end its mask is 0
      const Lane slope = sums.template add<kind>(a, plan, token);
      grad[i] = token.mask.r != 0 ? token.mask.r * weight * slope.r : 0.f;
      grad_entropy[i] = -token.mask.r * weight * entropy_coef;
    }
    const int64_t at = place.start() + t;
    if (a.grad_logprobs) store_run(static_cast<float*>(a.grad_logprobs) + at, n, grad);
    if (a.grad_entropy) store_run(static_cast<float*>(a.grad_entropy) + at, n, grad_entropy);
  }
}

// The row's sums from all threads, and the plan that follows, in every thread.
__device__ __forceinline__ RowPlan plan_row(const PolicyArgs& a, const Place& place, double* space, double& row_tokens) {
  const int64_t size = place.size();
  RowSums<Lane> sums;
  const bool only_counts = !by_sequence(a.kind) && !corrects_sequences(a);
  for (int64_t t = threadIdx.x * group; t < size; t += unit_threads * group) {
    const int n = size - t < group ? static_cast<int>(size - t) : group;
    if (only_counts) {
      float m[group];
      place.load_mask(a.mask, t, n, m);
#pragma unroll
      for (int i = 0; i < group; ++i) sums.tokens.r += m[i];
      continue;
    }
    const TokenGroup tokens(a, place, t, n);
#pragma unroll
    for (int i = 0; i < group; ++i) sums.add(a, tokens[i]);
  }
  double x[8] = {sums.tokens.r, sums.log_ratio.r, sums.clipped.r, sums.positive.r, sums.negative.r, sums.advantage.r, sums.weights.r, sums.mismatch.r};
  block_sum(x, space);
  RowPart part;
  part.tokens = x[0], part.log_ratio = x[1], part.clipped_log_ratio = x[2], part.positive = x[3], part.negative = x[4];
  part.advantage = x[5], part.weight = x[6], part.mismatch = x[7];
  row_tokens = part.tokens;
  return close_row(a, part);
}

// On a multiprocessor. For a third block sm_100 would keep two registers in memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int flat_blocks = 2;
#else
constexpr int flat_blocks = 3;
#endif

template <PolicyKind kind, bool ByRow>
__global__ void __launch_bounds__(unit_threads, ByRow ? 1 : flat_blocks) policy_kernel(PolicyArgs a, cuda::LossResults results, double* partials, int* counter) {
  double* space = reinterpret_cast<double*>(block_memory());
  const Place place{&a.rows, static_cast<int64_t>(blockIdx.x), !ByRow};
  TokenSums<Lane> sums;
  RowPlan plan;
  plan.weight = 1;
  double row_tokens = 0;
  if (ByRow) {
    plan = plan_row(a, place, space, row_tokens);
    add_tokens<kind>(a, place, plan, 0, place.size(), sums);
  } else {
    const int64_t total = place.size(), unit = flat_unit(total), begin = static_cast<int64_t>(blockIdx.x) * unit;
    add_tokens<kind>(a, place, plan, begin, begin + unit < total ? begin + unit : total, sums);
  }
  double x[PolicySums::size] = {
      sums.loss.r * plan.weight, sums.low.r, sums.high.r, sums.dual.r, sums.ratio.r, sums.k1.r, sums.k3.r, sums.ref_kl.r, sums.entropy.r,
      sums.tokens.r, sums.mismatch.r, sums.correction.r, sums.corrected.r, sums.ratio_min.r, sums.ratio_max.r, sums.mismatch_max.r};
  block_reduce(x, space, reduce_policy);
  double* to = partials + partial_size * static_cast<int64_t>(blockIdx.x);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < PolicySums::size; ++i) to[i] = x[i];
    to[PolicySums::size] = row_tokens != 0;
  }
  if (!last_block(counter, space)) return;
  double all[partial_size] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, INFINITY, -INFINITY, 0, 0};
  for (int64_t p = threadIdx.x; p < gridDim.x; p += blockDim.x)
#pragma unroll
    for (int i = 0; i < partial_size; ++i) all[i] = reduce_policy(i, all[i], load_shared_by_blocks(partials + p * partial_size + i));
  block_reduce(all, space, reduce_policy);
  if (threadIdx.x == 0)
#pragma unroll
    for (int i = 0; i < partial_size; ++i) space[i] = all[i];  // indexed below: in registers it could not be
  const int64_t length = longest_row(a.reduction, a.rows, space + partial_size);
  if (threadIdx.x != 0) return;
  Totals totals;
  totals.tokens = space[9], totals.sequences = space[PolicySums::size];
  const double share = share_of(a.reduction, results.denominator ? *results.denominator : a.denominator, totals, length);
  PolicySums::write(space, share, [&](int i, double value) { *(i == 0 ? results.loss : results.stats + i - 1) = static_cast<float>(value); });
  *results.share = static_cast<float>(share);
}

constexpr int64_t space_bytes = partial_size * (unit_threads / 32) * sizeof(double);

__device__ __forceinline__ void store_rounded(void* out, DType dtype, int64_t i, int n, const float (&x)[group]) {
  if (dtype == DType::f32) return store_run(static_cast<float*>(out) + i, n, x);
  uint16_t* to = static_cast<uint16_t*>(out) + i;
#pragma unroll
  for (int k = 0; k < group; ++k) if (k < n) to[k] = dtype == DType::bf16 ? float_to_bf16(x[k]) : float_to_half(x[k]);
}

__global__ void __launch_bounds__(unit_threads) scale_kernel(const float* d, const float* grad, const float* share, int64_t count, DType dtype, void* out) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * unit_threads + threadIdx.x) * group;
  if (i >= count) return;
  const int n = count - i < group ? static_cast<int>(count - i) : group;
  const float factor = *grad * *share;
  float x[group];
  load_run({d, DType::f32, 0, 1, false}, i, 1, n, x);
#pragma unroll
  for (int k = 0; k < group; ++k) x[k] *= factor;
  store_rounded(out, dtype, i, n, x);
}

__global__ void __launch_bounds__(unit_threads) rescale_kernel(Array x, const float* factor, int64_t count) {
  const float f = *factor;
  if (f == 1.f) return;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * unit_threads + threadIdx.x) * group;
  if (i >= count) return;
  const int n = count - i < group ? static_cast<int>(count - i) : group;
  float v[group];
  load_run(x, i, 1, n, v);
#pragma unroll
  for (int k = 0; k < group; ++k) v[k] *= f;
  store_rounded(const_cast<void*>(x.data), x.dtype, i, n, v);
}

}}}  // namespace

namespace fastrlhf { namespace cuda {

using namespace FASTRLHF_ISA;

int policy_loss(const PolicyArgs& a, const LossResults& results, const Launch& l) {
  const bool over_tokens = a.reduction == Reduction::token_mean || a.reduction == Reduction::token_sum;
  const bool rows_matter = by_sequence(a.kind) || corrects_sequences(a) || !over_tokens || (a.advantages.per_row && a.rows.cu_seqlens);
  const bool by_row = rows_matter && a.rows.count > 0;
  const int64_t total = a.rows.total(), wanted = by_row ? a.rows.count : units_of(total, flat_unit(total)), blocks = wanted > 0 ? wanted : 1;
  if (partial_size * blocks > l.workspace_size) return no_workspace;
  int status = 0;
  with_policy_kind(a.kind, [&](auto kind) {
    constexpr PolicyKind k = decltype(kind)::value, without_rows = by_sequence(k) ? PolicyKind::ppo : k;
    const Grid grid{blocks, unit_threads, space_bytes};
    const auto stream = static_cast<cudaStream_t>(l.stream);
    status = by_row ? launch(policy_kernel<k, true>, grid, stream, a, results, l.workspace, l.counter)
                    : launch(policy_kernel<without_rows, false>, grid, stream, a, results, l.workspace, l.counter);
  });
  return status;
}

int scale(const float* d, const float* grad, const float* share, int64_t count, DType dtype, void* out, const Launch& l) {
  constexpr int64_t each = unit_threads * group;
  return launch(scale_kernel, {(count + each - 1) / each, unit_threads}, static_cast<cudaStream_t>(l.stream), d, grad, share, count, dtype, out);
}

int rescale(void* x, const float* factor, int64_t count, DType dtype, const Launch& l) {
  constexpr int64_t each = unit_threads * group;
  return launch(rescale_kernel, {(count + each - 1) / each, unit_threads}, static_cast<cudaStream_t>(l.stream), Array{x, dtype, 0, 1, false}, factor, count);
}

}}  // namespace
