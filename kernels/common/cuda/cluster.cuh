// Hopper's thread-block clusters and bulk copies, in small functions with plain twins.
#pragma once

#include "platform.cuh"

#if defined(FASTRLHF_CUDA_HOST) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTRLHF_CLUSTERS 1
#endif

#if defined(FASTRLHF_CLUSTERS)
namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

#if defined(FASTRLHF_CUDA_HOST)
inline unsigned cluster_rank() { return shim::current->rank; }
inline void cluster_barrier() { shim::cluster_barrier(); }
template <class T>
inline const T* of_block(const T* here, unsigned rank) { return reinterpret_cast<const T*>(shim::cluster_memory(here, rank)); }
// A phase ends when so many threads have arrived and all bytes that were announced are there; bytes may come before their announcement.
struct HostBarrier {
  int32_t bytes;
  uint8_t arrivals, pending, phase, unused;

  static HostBarrier& at(uint64_t* p) { return *reinterpret_cast<HostBarrier*>(p); }
  void arrive(int32_t announced) {
    bytes += announced;
    --pending;
    turn();
  }
  void complete(uint32_t arrived) {
    bytes -= static_cast<int32_t>(arrived);
    turn();
  }
  void turn() {
    if (pending != 0 || bytes != 0) return;
    pending = arrivals;
    phase ^= 1;
    shim::went_on();
  }
};
static_assert(sizeof(HostBarrier) == sizeof(uint64_t), "");

inline void barrier_init(uint64_t* barrier, int arrivals) {
  HostBarrier::at(barrier) = {0, static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0, 0};
}
inline void barrier_init_done() {}
inline void barrier_arrive(uint64_t* barrier, unsigned rank) {
  HostBarrier::at(reinterpret_cast<uint64_t*>(shim::cluster_memory(barrier, rank))).arrive(0);
}
inline void bulk_expect(uint64_t* barrier, uint32_t bytes) { HostBarrier::at(barrier).arrive(static_cast<int32_t>(bytes)); }
inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  memcpy(to, from, bytes);
  HostBarrier::at(barrier).complete(bytes);
}
inline void bulk_wait(uint64_t* barrier, uint32_t phase) {
  while (HostBarrier::at(barrier).phase == phase) shim::yield();
  shim::went_on();
}
#else
__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ const T* of_block(const T* here, unsigned rank) {
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(here)), "r"(rank));
  return reinterpret_cast<const T*>(there);
}
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// The calling thread has arrived at the barrier in the same place of another block of the cluster (or of this one).
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, unsigned rank) {
  asm volatile(
      "{\n\t.reg .b32 there;\n\t"
      "mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n\t}" :: "r"(shared_address(barrier)), "r"(rank) : "memory");
}
// One thread: so many bytes will arrive, then the copies; every thread waits for the phase.
__device__ __forceinline__ void bulk_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void bulk_wait(uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again_%=:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@done bra over_%=;\n\tbra again_%=;\n\tover_%=:\n\t}" :: "r"(shared_address(barrier)), "r"(phase) : "memory");
}
#endif

}}}  // namespace
#endif
