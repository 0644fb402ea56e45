// Which build of the CPU kernels runs. Every kernel file is compiled once per level, in a namespace of that name.
#pragma once

namespace fastrlhf {

enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

constexpr int isa_count = 4;
const char* isa_name(Isa isa);
bool isa_available(Isa isa);  // built in, and this processor has it
Isa current_isa();
void set_isa(Isa isa);

}  // namespace fastrlhf

// FASTRLHF_KERNEL(Args, name) declares `void name(const Args&)` at every level and `fastrlhf::name`, which picks one.
// FASTRLHF_KERNEL_BF16: the same for a kernel that is also built for AVX-512-BF16 (those that write bf16 rows).
#if defined(FASTRLHF_HAVE_X86)
#define FASTRLHF_KERNEL(Args, name)                         \
  namespace scalar { void name(const Args&); }              \
  namespace avx2 { void name(const Args&); }                \
  namespace avx512 { void name(const Args&); }              \
  inline void name(const Args& args) {                      \
    switch (current_isa()) {                                \
      case Isa::avx512_bf16:                                \
      case Isa::avx512: return avx512::name(args);          \
      case Isa::avx2: return avx2::name(args);              \
      default: return scalar::name(args);                   \
    }                                                       \
  }
#define FASTRLHF_KERNEL_BF16(Args, name)                    \
  namespace scalar { void name(const Args&); }              \
  namespace avx2 { void name(const Args&); }                \
  namespace avx512 { void name(const Args&); }              \
  namespace avx512_bf16 { void name(const Args&); }         \
  inline void name(const Args& args) {                      \
    switch (current_isa()) {                                \
      case Isa::avx512_bf16: return avx512_bf16::name(args);\
      case Isa::avx512: return avx512::name(args);          \
      case Isa::avx2: return avx2::name(args);              \
      default: return scalar::name(args);                   \
    }                                                       \
  }
#else
#define FASTRLHF_KERNEL(Args, name)                         \
  namespace scalar { void name(const Args&); }              \
  inline void name(const Args& args) { scalar::name(args); }
#define FASTRLHF_KERNEL_BF16(Args, name) FASTRLHF_KERNEL(Args, name)
#endif
