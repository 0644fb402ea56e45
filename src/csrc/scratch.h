// Memory of a call. Not std::vector: what a kernel file instantiates from a header is compiled for its own instruction
// set, and the linker may keep that copy for everybody.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fastrlhf {

// What fits is in `near`, 512 bytes beside the caller's variables: an aligned allocation costs up to 0.1 us, and a call on a
// few tokens makes six. 64-byte aligned; throws std::bad_alloc.
constexpr int64_t scratch_near = 512;
void* scratch_allocate(int64_t bytes, bool zeroed, void* near);
void scratch_free(void* p) noexcept;

struct Uninitialized {};

// Asks for huge pages under a large, freshly allocated output: where the system leaves that to programs, touching 512 MB
// for the first time took 174 ms in pages of 4 KB and 62 ms in huge ones. A hint; failure is no error.
void prefer_huge_pages(void* p, int64_t bytes) noexcept;

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(allocate(n, true)) {}
  Scratch(int64_t n, Uninitialized) : data_(allocate(n, false)) {}
  ~Scratch() { if (static_cast<void*>(data_) != near_) scratch_free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* allocate(int64_t n, bool zeroed) {
    return static_cast<T*>(scratch_allocate(n * static_cast<int64_t>(sizeof(T)), zeroed, near_));
  }

  alignas(64) unsigned char near_[scratch_near];
  T* data_;
};

}  // namespace fastrlhf
