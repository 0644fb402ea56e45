#include "cuda.h"

#include "common/cuda/tokens.cuh"
#include "common/reduction.h"
#include "masked_stats/moments.cuh"
#include "math.h"

// The scheme of kernels/policy_loss/cuda.cu: one launch, gradients without the divisor, the last block adds up. The explained
// variance comes from moments of a unit's tokens, which its threads hold in registers, merged in order.

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

enum { residuals, returns, values, arrays };
constexpr int partial_size = 3 * arrays + 3;  // moments, then loss, clipped, is it a sequence

template <bool ByRow>
__global__ void __launch_bounds__(unit_threads) value_kernel(ValueArgs a, cuda::LossResults results, double* partials, int* counter) {
  double* space = reinterpret_cast<double*>(block_memory());
  const Place place{&a.rows, static_cast<int64_t>(blockIdx.x), !ByRow};
  const int64_t size = place.size();
  double factor[1] = {1};
  if (ByRow) {
    float tokens = 0;
    for (int64_t t = threadIdx.x * group; t < size; t += unit_threads * group) {
      float m[group];
      place.load_mask(a.mask, t, size - t < group ? static_cast<int>(size - t) : group, m);
#pragma unroll
      for (int i = 0; i < group; ++i) tokens += m[i];
    }
    factor[0] = tokens;
    block_sum(factor, space);
    factor[0] = row_factor(a.reduction, factor[0]);
  }
  const float weight = static_cast<float>(factor[0]);
  Moments all[arrays];
  float sums[2] = {};
  const int64_t first = ByRow ? 0 : static_cast<int64_t>(blockIdx.x) * unit_size, last = ByRow ? size : first + unit_size;
  for (int64_t begin = first; begin < last; begin += unit_size) {
    float x[arrays][thread_groups][group], m[thread_groups][group];
#pragma unroll
    for (int g = 0; g < thread_groups; ++g) {
      const int64_t t = begin + (g * unit_threads + threadIdx.x) * group, left = size - t;
      const int n = left < 0 ? 0 : left < group ? static_cast<int>(left) : group;
      float old[group] = {}, grad[group];
      if (n == 0) {
#pragma unroll
        for (int i = 0; i < group; ++i) m[g][i] = x[values][g][i] = x[returns][g][i] = x[residuals][g][i] = 0.f;
        continue;
      }
      place.load_mask(a.mask, t, n, m[g]);
      place.load(a.values, t, n, x[values][g]);
      place.load(a.returns, t, n, x[returns][g]);
      if (a.old_values) place.load(a.old_values, t, n, old);
#pragma unroll
      for (int i = 0; i < group; ++i) {
        const float v = x[values][g][i], r = x[returns][g][i], w = m[g][i];
        Lane square, slope, clipped;
        value_error(Lane{v}, Lane{a.old_values ? old[i] : v}, Lane{r}, Lane{static_cast<float>(a.clip)}, square, slope, clipped);
        sums[0] += w != 0 ? w * square.r : 0.f;
        sums[1] += w != 0 ? w * clipped.r : 0.f;
        grad[i] = w != 0 ? w * weight * slope.r : 0.f;
        x[residuals][g][i] = r - v;
      }
      if (a.grad_values) store_run(static_cast<float*>(a.grad_values) + place.start() + t, n, grad);
    }
    Moments unit[arrays];
    block_moments(x, m, space, unit);
#pragma unroll
    for (int k = 0; k < arrays; ++k) all[k].merge(unit[k]);
  }
  double total[2] = {sums[0], sums[1]};
  block_sum(total, space);
  double* to = partials + partial_size * static_cast<int64_t>(blockIdx.x);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int k = 0; k < arrays; ++k) to[3 * k] = all[k].n, to[3 * k + 1] = all[k].mean, to[3 * k + 2] = all[k].m2;
    to[3 * arrays] = 0.5 * factor[0] * total[0], to[3 * arrays + 1] = total[1], to[3 * arrays + 2] = all[values].n != 0;
  }
  if (!last_block(counter, space)) return;
  Moments merged[arrays];
#pragma unroll
  for (int k = 0; k < arrays; ++k) merged[k] = merge_partials(partials + 3 * k, gridDim.x, partial_size, space);
  double rest[3] = {};
  for (int64_t p = threadIdx.x; p < gridDim.x; p += blockDim.x)
#pragma unroll
    for (int i = 0; i < 3; ++i) rest[i] += load_shared_by_blocks(partials + p * partial_size + 3 * arrays + i);
  block_sum(rest, space);
  const int64_t length = longest_row(a.reduction, a.rows, space);
  if (threadIdx.x != 0) return;
  Totals totals;
  totals.tokens = merged[values].n, totals.sequences = rest[2];
  const double share = share_of(a.reduction, results.denominator ? *results.denominator : a.denominator, totals, length);
  *results.loss = static_cast<float>(rest[0] * share);
  results.stats[0] = static_cast<float>(totals.tokens != 0 ? rest[1] / totals.tokens : 0);
  results.stats[1] = static_cast<float>(merged[returns].m2 > 0 ? 1 - merged[residuals].m2 / merged[returns].m2 : 0);
  results.stats[2] = static_cast<float>(merged[values].mean);
  results.stats[3] = static_cast<float>(merged[returns].mean);
  results.stats[4] = static_cast<float>(totals.tokens);
  *results.share = static_cast<float>(share);
}

constexpr int64_t space_bytes = 3 * unit_threads * sizeof(double);

}}}  // namespace

namespace fastrlhf { namespace cuda {

using namespace FASTRLHF_ISA;

int value_loss(const ValueArgs& a, const LossResults& results, const Launch& l) {
  const bool over_tokens = a.reduction == Reduction::token_mean || a.reduction == Reduction::token_sum;
  const bool by_row = !over_tokens && a.rows.count > 0;
  const int64_t wanted = by_row ? a.rows.count : units_of(a.rows.total()), blocks = wanted > 0 ? wanted : 1;
  if (partial_size * blocks > l.workspace_size) return no_workspace;
  const Grid grid{blocks, unit_threads, space_bytes};
  const auto stream = static_cast<cudaStream_t>(l.stream);
  return by_row ? launch(value_kernel<true>, grid, stream, a, results, l.workspace, l.counter)
                : launch(value_kernel<false>, grid, stream, a, results, l.workspace, l.counter);
}

}}  // namespace
