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
// the barrier counts its phases; one copy ends one
inline void barrier_init(uint64_t* barrier, int) { *barrier = 0; }
inline void barrier_init_done() {}
inline void bulk_expect(uint64_t*, uint32_t) {}
inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  memcpy(to, from, bytes);
  ++*barrier;
}
inline void bulk_wait(uint64_t* barrier, uint32_t phase) {
  while ((*barrier & 1) == phase) shim::yield();
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
