// Hopper's tensor copies and warpgroup products for bfloat16 tiles of 64 columns (128 bytes a row, swizzled), in small functions
// with plain twins. On a device the instructions are those of CUTLASS's headers; what lies where in a tile is the same in the twins,
// address bits and all, so that the kernels' indexing runs in tests on the host.
#pragma once

#include "cluster.cuh"
#include "tile_layout.h"

#if defined(FASTRLHF_CUDA_HOST)
#include "common/half.h"
#define FASTRLHF_SM90A 1
#define FASTRLHF_GRID_CONSTANT
#else
#include <cuda.h>
#define FASTRLHF_GRID_CONSTANT __grid_constant__
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTRLHF_SM90A 1
#endif
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/reg_reconfig.h>

#include <utility>
#endif

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

// Rows of a bfloat16 matrix in memory, as tensor copies see it: outside of it there are zeros.
#if defined(FASTRLHF_CUDA_HOST)
struct TensorMap {
  const uint16_t* data;
  int64_t rows, columns, row_stride;
  int box_rows;
};

inline int encode_tensor_map(TensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t row_stride, int box_rows) {
  map = {static_cast<const uint16_t*>(data), rows, columns, row_stride, box_rows};
  return 0;
}

inline uint16_t* swizzled(uint16_t* p) { return reinterpret_cast<uint16_t*>(swizzled_address(reinterpret_cast<uintptr_t>(p))); }

inline void tensor_prefetch(const TensorMap&) {}
// `blocks`: a bit for each block of the cluster that gets the tile, in the same place, and the bytes counted at the same barrier.
inline void tensor_load(const TensorMap& map, uint16_t* to, uint64_t* barrier, int column, int row, unsigned blocks) {
  for (unsigned rank = 0; blocks >> rank; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    auto* there = reinterpret_cast<uint16_t*>(shim::cluster_memory(to, rank));
    for (int r = 0; r < map.box_rows; ++r)
      for (int c = 0; c < tile_depth; ++c) {
        const bool inside = row + r < map.rows && column + c < map.columns;
        *swizzled(there + r * tile_depth + c) = inside ? map.data[(row + r) * map.row_stride + column + c] : 0;
      }
    HostBarrier::at(reinterpret_cast<uint64_t*>(shim::cluster_memory(barrier, rank))).complete(map.box_rows * tile_depth * 2);
  }
}

inline uint64_t operand(const uint16_t* tile) { return reinterpret_cast<uint64_t>(tile); }
template <int n>
inline void product_fence(float (&)[n]) {}
inline void product_begin() {}
inline void product_commit() {}
template <int left>
inline void product_wait() { __syncwarp(); }  // a warp's lanes go through it together
template <int registers>
inline void take_registers() {}
template <int registers>
inline void give_registers() {}
inline void pass_time(int) {}

// d = a b^T, or d + a b^T: 64 x 16 by 256 x 16, both as they lie in a tile.
inline void product(float (&d)[fragment_size], uint64_t a, uint64_t b, bool add) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  for (int half = 0; half < 2; ++half) {
    const int row = fragment_row(thread, 2 * half);
    float x[product_depth];
    for (int k = 0; k < product_depth; ++k) x[k] = bf16_to_float(*swizzled(reinterpret_cast<uint16_t*>(a) + row * tile_depth + k));
    for (int i = 2 * half; i < fragment_size; i += i % 2 ? 3 : 1) {
      float sum = add ? d[i] : 0.f;
      for (int k = 0; k < product_depth; k += 8) {  // 16 bytes stay together
        const uint16_t* y = swizzled(reinterpret_cast<uint16_t*>(b) + fragment_column(thread, i) * tile_depth + k);
        for (int j = 0; j < 8; ++j) sum += x[k + j] * bf16_to_float(y[j]);
      }
      d[i] = sum;
    }
  }
}
#else
using TensorMap = CUtensorMap;

// The driver's function, found through the runtime: nothing links to the driver.
inline int encode_tensor_map(TensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t row_stride, int box_rows) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                              const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  struct Entry { void* function = nullptr; cudaError_t error; };
  static const Entry entry = [] {
    Entry e;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    e.error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &e.function, 12000, cudaEnableDefault, &found);
#else
    e.error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &e.function, cudaEnableDefault, &found);
#endif
    if (e.error == cudaSuccess && found != cudaDriverEntryPointSuccess) e.error = cudaErrorSymbolNotFound;
    return e;
  }();
  if (entry.error != cudaSuccess) return entry.error;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[2] = {tile_depth, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<Encode>(entry.function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#if defined(__CUDACC__)
__device__ __forceinline__ void tensor_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" :: "l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}
// `blocks`: a bit for each block of the cluster that gets the tile, in the same place, and the bytes counted at the same barrier.
__device__ __forceinline__ void tensor_load(const TensorMap& map, uint16_t* to, uint64_t* barrier, int column, int row, unsigned blocks) {
  const uint64_t hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  if (blocks & (blocks - 1)) cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, barrier, static_cast<uint16_t>(blocks), hint, to, column, row);
  else cute::SM90_TMA_LOAD_2D::copy(&map, barrier, hint, to, column, row);
}

__device__ __forceinline__ uint64_t operand(const uint16_t* tile) { return operand_descriptor(shared_address(tile)); }
// No access to the accumulators may move past this.
template <int n>
__device__ __forceinline__ void product_fence(float (&d)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) cute::warpgroup_fence_operand(d[i]);
}
__device__ __forceinline__ void product_begin() { cute::warpgroup_arrive(); }
__device__ __forceinline__ void product_commit() { cute::warpgroup_commit_batch(); }
template <int left>
__device__ __forceinline__ void product_wait() { cute::warpgroup_wait<left>(); }
template <int registers>
__device__ __forceinline__ void take_registers() { cutlass::arch::warpgroup_reg_alloc<registers>(); }
template <int registers>
__device__ __forceinline__ void give_registers() { cutlass::arch::warpgroup_reg_dealloc<registers>(); }

// So many clocks.
__device__ __forceinline__ void pass_time(int clocks) {
  const long long from = clock64();
  while (clock64() - from < clocks) {}
}

template <size_t... i>
__device__ __forceinline__ void product_of(float (&d)[fragment_size], uint64_t a, uint64_t b, bool add, std::index_sequence<i...>) {
  using namespace cute::SM90::GMMA;
  MMA_64x256x16_F32BF16BF16_SS<Major::K, Major::K>::fma(a, b, d[i]..., add ? ScaleOut::One : ScaleOut::Zero);
}
// d = a b^T, or d + a b^T: 64 x 16 by 256 x 16, both as they lie in a tile.
__device__ __forceinline__ void product(float (&d)[fragment_size], uint64_t a, uint64_t b, bool add) {
  product_of(d, a, b, add, std::make_index_sequence<fragment_size>());
}
#endif
#endif

}}}  // namespace
