#include "scratch.h"

#include <sys/mman.h>

#include <cstring>

namespace fastrlhf {

void* scratch_allocate(int64_t bytes, bool zeroed, void* near) {
  void* p = bytes <= scratch_near ? near : std::aligned_alloc(64, (static_cast<size_t>(bytes) + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  if (zeroed && bytes > 0) std::memset(p, 0, static_cast<size_t>(bytes));
  return p;
}

void scratch_free(void* p) noexcept { std::free(p); }

void prefer_huge_pages(void* p, int64_t bytes) noexcept {
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace fastrlhf
