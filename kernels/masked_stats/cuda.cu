#include "cuda.h"

#include "common/cuda/tokens.cuh"
#include "moments.cuh"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

// A unit of a row, or of all tokens, as one block holds it.
__device__ __forceinline__ void load_unit(const Place& place, const Array& x, const Array& mask, int64_t begin, float (&values)[1][thread_groups][group],
                                          float (&weights)[thread_groups][group]) {
  const int64_t size = place.size();
#pragma unroll
  for (int g = 0; g < thread_groups; ++g) {
    const int64_t t = begin + (g * unit_threads + threadIdx.x) * group, left = size - t;
    const int n = left < 0 ? 0 : left < group ? static_cast<int>(left) : group;
    if (n == 0) {
#pragma unroll
      for (int i = 0; i < group; ++i) values[0][g][i] = weights[g][i] = 0.f;
      continue;
    }
    place.load(x, t, n, values[0][g]);
    place.load_mask(mask, t, n, weights[g]);
  }
}

__global__ void __launch_bounds__(unit_threads, 1) moments_kernel(MomentsArgs a, double* partials, int* counter, double* out, float* variance, bool unbiased) {
  double* space = reinterpret_cast<double*>(block_memory());
  const Place place{&a.rows, 0, true};
  float x[1][thread_groups][group], m[thread_groups][group];
  load_unit(place, a.x, a.mask, static_cast<int64_t>(blockIdx.x) * unit_size, x, m);
  Moments of[1];
  block_moments(x, m, space, of);
  if (threadIdx.x == 0) {
    double* to = partials + 3 * static_cast<int64_t>(blockIdx.x);
    to[0] = of[0].n, to[1] = of[0].mean, to[2] = of[0].m2;
  }
  if (!last_block(counter, space)) return;
  const Moments all = merge_partials(partials, gridDim.x, 3, space);
  if (threadIdx.x != 0) return;
  out[0] = all.n, out[1] = all.mean, out[2] = all.m2;
  if (variance) {
    const double over = unbiased ? all.n - 1 : all.n;
    *variance = over > 0 ? static_cast<float>(all.m2 / over) : 0.f;
  }
}

__device__ __forceinline__ void write_row_sum(const RowSumsArgs& a, int64_t b, double total, double count) {
  static_cast<float*>(a.sums)[b] = static_cast<float>(a.average ? (count != 0 ? total / count : 0) : total);
  if (a.counts) static_cast<float*>(a.counts)[b] = static_cast<float>(count);
}

// Padded rows are cut into units, whose partial sums the last block adds row by row; a segment of a pack is one block's.
__global__ void __launch_bounds__(unit_threads, 1) row_sums_kernel(RowSumsArgs a, int64_t units, double* partials, int* counter) {
  double* space = reinterpret_cast<double*>(block_memory());
  const bool packed = a.rows.cu_seqlens != nullptr;
  const int64_t b = packed ? blockIdx.x : blockIdx.x / units, unit = packed ? 0 : blockIdx.x % units;
  const Place place{&a.rows, b, false};
  double total = 0, count = 0;
  const int64_t end = packed ? place.size() : (unit + 1) * unit_size;
  for (int64_t begin = unit * unit_size; begin < end; begin += unit_size) {
    float x[1][thread_groups][group], m[thread_groups][group], sums[2] = {};
    load_unit(place, a.x, a.mask, begin, x, m);
#pragma unroll
    for (int g = 0; g < thread_groups; ++g)
#pragma unroll
      for (int i = 0; i < group; ++i) {
        sums[0] += m[g][i] != 0 ? m[g][i] * x[0][g][i] : 0.f;
        sums[1] += m[g][i];
      }
    block_sum(sums, space);
    total += sums[0], count += sums[1];
  }
  if (packed || units == 1) {
    if (threadIdx.x == 0) write_row_sum(a, b, total, count);
    return;
  }
  if (threadIdx.x == 0) partials[2 * blockIdx.x] = total, partials[2 * blockIdx.x + 1] = count;
  if (!last_block(counter, space)) return;
  for (int64_t row = threadIdx.x; row < a.rows.count; row += blockDim.x) {
    double sum = 0, n = 0;
    for (int64_t u = row * units; u < (row + 1) * units; ++u) {
      sum += load_shared_by_blocks(partials + 2 * u);
      n += load_shared_by_blocks(partials + 2 * u + 1);
    }
    write_row_sum(a, row, sum, n);
  }
}

__global__ void __launch_bounds__(unit_threads, 1) standardize_kernel(StandardizeArgs a, const double* moments, bool shift_mean, bool unbiased, double eps) {
  const double n = moments[0], mean = moments[1], over = unbiased ? n - 1 : n;
  const double spread = (over > 0 ? moments[2] / over : 0) + eps;
  const float shift = static_cast<float>(mean), scale = spread > 0 ? static_cast<float>(1 / sqrt(spread)) : 0.f, back = shift_mean ? 0.f : shift;
  const float rest = static_cast<float>((shift - mean) * scale);  // what rounding the mean left over
  const Place place{&a.rows, 0, true};
  const int64_t size = place.size(), t = (static_cast<int64_t>(blockIdx.x) * unit_threads + threadIdx.x) * group;
  if (t >= size) return;
  const int count = size - t < group ? static_cast<int>(size - t) : group;
  float x[group], m[group];
  place.load(a.x, t, count, x);
  place.load_mask(a.mask, t, count, m);
#pragma unroll
  for (int i = 0; i < group; ++i) x[i] = m[i] != 0 ? fmaf(x[i] - shift, scale, rest) + back : 0.f;
  store_run(static_cast<float*>(a.out) + t, count, x);
}

constexpr int64_t space_bytes = 3 * unit_threads * sizeof(double);

}}}  // namespace

namespace fastrlhf { namespace cuda {

using namespace FASTRLHF_ISA;

int masked_moments(const MomentsArgs& a, double* out, float* variance, bool unbiased, const Launch& l) {
  const int64_t blocks = units_of(a.rows.total()) > 0 ? units_of(a.rows.total()) : 1;
  if (3 * blocks > l.workspace_size) return no_workspace;
  return launch(moments_kernel, {blocks, unit_threads, space_bytes}, static_cast<cudaStream_t>(l.stream), a, l.workspace, l.counter, out, variance, unbiased);
}

int row_sums(const RowSumsArgs& a, const Launch& l) {
  const int64_t units = a.rows.cu_seqlens || a.rows.length == 0 ? 1 : units_of(a.rows.length), blocks = a.rows.count * units;
  if (units > 1 && 2 * blocks > l.workspace_size) return no_workspace;
  return launch(row_sums_kernel, {blocks, unit_threads, space_bytes}, static_cast<cudaStream_t>(l.stream), a, units, l.workspace, l.counter);
}

int standardize(const StandardizeArgs& a, const double* moments, bool shift_mean, bool unbiased, double eps, const Launch& l) {
  constexpr int64_t each = unit_threads * group;
  return launch(standardize_kernel, {(a.rows.total() + each - 1) / each, unit_threads}, static_cast<cudaStream_t>(l.stream), a, moments, shift_mean, unbiased, eps);
}

}}  // namespace
