// Memory of a call. Not std::vector: what a kernel file instantiates from a header is compiled for its own instruction
// set, and the linker may keep that copy for everybody.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastrlhf {

void* scratch_allocate(int64_t bytes, bool zeroed);  // 64-byte aligned; throws std::bad_alloc

struct Uninitialized {};
void scratch_free(void* p) noexcept;

// Asks for huge pages under a large, freshly allocated output: where the system leaves that to programs, touching 512 MB
// for the first time took 174 ms in pages of 4 KB and 62 ms in huge ones. A hint; failure is no error.
void prefer_huge_pages(void* p, int64_t bytes) noexcept;

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(scratch_allocate(n * static_cast<int64_t>(sizeof(T)), true))) {}
  Scratch(int64_t n, Uninitialized) : data_(static_cast<T*>(scratch_allocate(n * static_cast<int64_t>(sizeof(T)), false))) {}
  ~Scratch() { scratch_free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace fastrlhf
