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

namespace fastrlhf {

// float64 or not, of the arguments of a FASTRLHF_KERNEL_F64; overloaded where they say it otherwise.
template <class Args>
auto is_f64(const Args& args) -> decltype(args.f64) { return args.f64; }

}  // namespace fastrlhf

// FASTRLHF_KERNEL(Args, name) declares `void name(const Args&)` at every level and `fastrlhf::name`, which picks one.
//
// A level that a dtype gains nothing from is not built for it, because compiling takes time:
// FASTRLHF_KERNEL_F64: float64, for checks and not for training, runs AVX2's build on AVX-512 too.
// FASTRLHF_KERNEL_BF16: so, and AVX-512-BF16 has a build of its own for the arguments that are `is_bf16`.
#define FASTRLHF_DECLARE_KERNEL(level, Args, name) \
  namespace level { void name(const Args&); }
#if defined(FASTRLHF_HAVE_X86)
#define FASTRLHF_KERNEL_WHERE(Args, name, in_avx512, in_avx512_bf16)   \
  FASTRLHF_DECLARE_KERNEL(scalar, Args, name)                          \
  FASTRLHF_DECLARE_KERNEL(avx2, Args, name)                            \
  FASTRLHF_DECLARE_KERNEL(avx512, Args, name)                          \
  inline void name(const Args& args) {                                 \
    const Isa isa = current_isa();                                     \
    in_avx512_bf16                                                     \
    if (isa >= Isa::avx512 && (in_avx512)) return avx512::name(args);  \
    if (isa >= Isa::avx2) return avx2::name(args);                     \
    scalar::name(args);                                                \
  }
#define FASTRLHF_KERNEL(Args, name) FASTRLHF_KERNEL_WHERE(Args, name, true, )
#define FASTRLHF_KERNEL_F64(Args, name) FASTRLHF_KERNEL_WHERE(Args, name, !is_f64(args), )
#define FASTRLHF_KERNEL_BF16(Args, name)              \
  FASTRLHF_DECLARE_KERNEL(avx512_bf16, Args, name)    \
  FASTRLHF_KERNEL_WHERE(Args, name, !is_f64(args),    \
                        if (isa == Isa::avx512_bf16 && is_bf16(args)) return avx512_bf16::name(args);)
#else
#define FASTRLHF_KERNEL(Args, name)              \
  FASTRLHF_DECLARE_KERNEL(scalar, Args, name)    \
  inline void name(const Args& args) { scalar::name(args); }
#define FASTRLHF_KERNEL_F64(Args, name) FASTRLHF_KERNEL(Args, name)
#define FASTRLHF_KERNEL_BF16(Args, name) FASTRLHF_KERNEL(Args, name)
#endif
