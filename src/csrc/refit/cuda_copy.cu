// A refit in one launch: a block copies a tile, some rows of one copy or a piece of a row.
//
// A copy kernel and not cudaMemcpy2DAsync: a layout of 1B parameters is hundreds of copies, and each call costs 2 to 5 µs of
// the host. Not yet measured on a GPU.
#include "common/cuda/platform.cuh"

#include "refit/cuda_copy.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int threads = 256, ahead = 4;

template <class T> __device__ __forceinline__ T load(const char* p) { return *reinterpret_cast<const T*>(p); }
template <class T> __device__ __forceinline__ void store(char* p, T x) { *reinterpret_cast<T*>(p) = x; }
template <> __device__ __forceinline__ Bytes16 load<Bytes16>(const char* p) { return load_streaming(p); }
template <> __device__ __forceinline__ void store<Bytes16>(char* p, Bytes16 x) { store_streaming(p, x); }

// Units of T, `ahead` loads of each thread under way at once.
template <class T>
__device__ void move(const char* src, char* dst, int64_t src_pitch, int64_t dst_pitch, int rows, int bytes) {
  const int per_row = bytes / static_cast<int>(sizeof(T)), total = rows * per_row;
  for (int first = static_cast<int>(threadIdx.x); first < total; first += threads * ahead) {
    T held[ahead];
    for (int k = 0; k < ahead; ++k) {
      const int i = first + k * threads;
      if (i < total) held[k] = load<T>(src + (i / per_row) * src_pitch + static_cast<int64_t>(i % per_row) * sizeof(T));
    }
    for (int k = 0; k < ahead; ++k) {
      const int i = first + k * threads;
      if (i < total) store<T>(dst + (i / per_row) * dst_pitch + static_cast<int64_t>(i % per_row) * sizeof(T), held[k]);
    }
  }
}

__global__ void __launch_bounds__(threads) copy_tiles(const int64_t* copies, const int64_t* tiles) {
  const int64_t* tile = tiles + 5 * static_cast<int64_t>(blockIdx.x);
  const int64_t* copy = copies + 6 * tile[0];
  const int64_t src_pitch = copy[4], dst_pitch = copy[5];
  const char* src = reinterpret_cast<const char*>(copy[0]) + tile[1] * src_pitch + tile[3];
  char* dst = reinterpret_cast<char*>(copy[1]) + tile[1] * dst_pitch + tile[3];
  const int rows = static_cast<int>(tile[2]), bytes = static_cast<int>(tile[4]);
  uint64_t low = reinterpret_cast<uint64_t>(src) | reinterpret_cast<uint64_t>(dst) | static_cast<uint64_t>(bytes);
  if (rows > 1) low |= static_cast<uint64_t>(src_pitch) | static_cast<uint64_t>(dst_pitch);
  if (low % 16 == 0) return move<Bytes16>(src, dst, src_pitch, dst_pitch, rows, bytes);
  if (low % 4 == 0) return move<uint32_t>(src, dst, src_pitch, dst_pitch, rows, bytes);
  if (low % 2 == 0) return move<uint16_t>(src, dst, src_pitch, dst_pitch, rows, bytes);
  move<uint8_t>(src, dst, src_pitch, dst_pitch, rows, bytes);
}

}}  // namespace FASTRLHF_ISA

namespace cuda {

int run_copies(const int64_t* copies, const int64_t* tiles, int64_t count, void* stream) {
  FASTRLHF_ISA::Grid grid{count, FASTRLHF_ISA::threads};
  return FASTRLHF_ISA::launch(FASTRLHF_ISA::copy_tiles, grid, static_cast<cudaStream_t>(stream), copies, tiles);
}

}}  // namespace
