// What a kernel needs of its machine: CUDA's, or (FASTRLHF_CUDA_HOST) the tests' stand-in that runs blocks on the host, thread
// by thread. Everything that takes inline PTX is a small function here with a plain twin.
#pragma once

#define FASTRLHF_GPU 1

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(FASTRLHF_CUDA_HOST)
#include "shim.h"
#else
#include <cuda_runtime.h>
#endif

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

// 2^x to 2 units in the last place, 0 for -inf.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(FASTRLHF_CUDA_HOST)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

struct alignas(16) Bytes16 { uint32_t word[4]; };

// 16 bytes that nobody on this chip will read again.
__device__ __forceinline__ Bytes16 load_streaming(const void* p) {
#if defined(FASTRLHF_CUDA_HOST)
  return *static_cast<const Bytes16*>(p);
#else
  Bytes16 b;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(b.word[0]), "=r"(b.word[1]), "=r"(b.word[2]), "=r"(b.word[3]) : "l"(p));
  return b;
#endif
}

// 16 bytes of memory that this launch may be writing.
__device__ __forceinline__ Bytes16 load_plain(const void* p) { return *static_cast<const Bytes16*>(p); }

__device__ __forceinline__ void store_streaming(void* p, Bytes16 b) {
#if defined(FASTRLHF_CUDA_HOST)
  *static_cast<Bytes16*>(p) = b;
#else
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "l"(p), "r"(b.word[0]), "r"(b.word[1]), "r"(b.word[2]), "r"(b.word[3]) : "memory");
#endif
}

// Written by another block before it took its ticket: past the first-level cache, which may hold what was there before.
__device__ __forceinline__ double load_shared_by_blocks(const double* p) {
#if defined(FASTRLHF_CUDA_HOST)
  return *p;
#else
  return __ldcg(p);
#endif
}

#if !defined(FASTRLHF_CUDA_HOST)
// The block's dynamic shared memory: all that any kernel here uses.
__device__ __forceinline__ unsigned char* block_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}
#else
inline unsigned char* block_memory() { return shim::block_memory(); }
#endif

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;
};

// kernel<<<...>>>(args) on a stream; returns CUDA's error code.
template <class... Params, class... Args>
inline int launch(void (*kernel)(Params...), const Grid& grid, cudaStream_t stream, const Args&... args) {
  if (grid.blocks == 0) return 0;
#if defined(FASTRLHF_CUDA_HOST)
  (void)stream;
  shim::run(grid.blocks, grid.threads, grid.shared_bytes, grid.cluster, [&] { kernel(static_cast<Params>(args)...); });
  return 0;
#else
  if (grid.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(grid.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute cluster[1];
  if (grid.cluster > 1) {
    cluster[0].id = cudaLaunchAttributeClusterDimension;
    cluster[0].val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    cluster[0].val.clusterDim.y = cluster[0].val.clusterDim.z = 1;
    config.attrs = cluster;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
#endif
}

// How many clusters of a launch run at the same time.
template <class... Params>
inline int64_t resident_clusters(void (*kernel)(Params...), const Grid& grid) {
#if defined(FASTRLHF_CUDA_HOST)
  (void)kernel, (void)grid;
  return 2;
#else
  if (cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes)) != cudaSuccess)
    return 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.cluster));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  cudaLaunchAttribute cluster[1];
  cluster[0].id = cudaLaunchAttributeClusterDimension;
  cluster[0].val.clusterDim.x = static_cast<unsigned>(grid.cluster);
  cluster[0].val.clusterDim.y = cluster[0].val.clusterDim.z = 1;
  config.attrs = cluster;
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, reinterpret_cast<const void*>(kernel), &config) != cudaSuccess || count < 1) return 1;
  return count;
#endif
}

// Multiprocessors of the current device.
inline int processors() {
#if defined(FASTRLHF_CUDA_HOST)
  return 3;  // so that a persistent grid takes several turns
#else
  static int count[64] = {};
  int device = 0;
  cudaGetDevice(&device);
  int& known = count[device & 63];
  if (known == 0) cudaDeviceGetAttribute(&known, cudaDevAttrMultiProcessorCount, device);
  return known;
#endif
}

}}}  // namespace
