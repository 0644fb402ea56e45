#include "scratch.h"

#include <cstring>

namespace fastrlhf {

void* scratch_allocate(int64_t bytes, bool zeroed) {
  const size_t size = (static_cast<size_t>(bytes > 0 ? bytes : 1) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, size);
  if (!p) throw std::bad_alloc();
  if (zeroed) std::memset(p, 0, size);
  return p;
}

void scratch_free(void* p) noexcept { std::free(p); }

}  // namespace fastrlhf
