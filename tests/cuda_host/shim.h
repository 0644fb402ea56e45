// What the CUDA kernels use of CUDA, on the host: blocks one after another, the blocks of a cluster together, threads as fibers that
// take turns at barriers. For tests: indexing, masking and reductions run, thread by thread, as they would on a GPU.
#pragma once

#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

typedef void* cudaStream_t;
struct ThreadIndex { unsigned x; };

namespace shim {

struct Thread { ThreadIndex thread, block, block_dim, grid_dim; unsigned rank; unsigned char* memory; };
extern Thread* current;

unsigned char* block_memory();
unsigned char* cluster_memory(const void* here, unsigned rank);  // the same place in the shared memory of another block of the cluster
void block_barrier();
int block_or(int x);
void cluster_barrier();
void went_on();  // something that others wait for has come
void yield();  // to the other threads, until what is waited for has come
// Every lane of the warp gives a value and gets all 32 of them.
const uint64_t* exchange(uint64_t mine);
void run(int64_t blocks, int threads, int64_t shared_bytes, int cluster, const std::function<void()>& kernel);

template <class T>
inline uint64_t pack(T x) { uint64_t bits = 0; __builtin_memcpy(&bits, &x, sizeof x); return bits; }
template <class T>
inline T unpack(uint64_t bits) { T x; __builtin_memcpy(&x, &bits, sizeof x); return x; }

}  // namespace shim

#define threadIdx (shim::current->thread)
#define blockIdx (shim::current->block)
#define blockDim (shim::current->block_dim)
#define gridDim (shim::current->grid_dim)

inline void __syncthreads() { shim::block_barrier(); }
inline int __syncthreads_or(int x) { return shim::block_or(x); }
inline void __threadfence() {}
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int atomicAdd(int* p, int x) { const int before = *p; *p += x; return before; }

inline void __syncwarp() { shim::exchange(0); }
inline int shim_lane() { return static_cast<int>(threadIdx.x & 31); }
template <class T>
inline T __shfl_sync(unsigned, T x, int lane) { return shim::unpack<T>(shim::exchange(shim::pack(x))[lane & 31]); }
template <class T>
inline T __shfl_xor_sync(unsigned, T x, int mask) { const int from = shim_lane() ^ mask; return shim::unpack<T>(shim::exchange(shim::pack(x))[from]); }
template <class T>
inline T __shfl_up_sync(unsigned, T x, int distance) {
  const int lane = shim_lane(), from = lane >= distance ? lane - distance : lane;
  return shim::unpack<T>(shim::exchange(shim::pack(x))[from]);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint64_t* all = shim::exchange(predicate != 0);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<unsigned>(all[i]) << i;
  return bits;
}
