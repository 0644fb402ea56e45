#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace fastrlhf {
namespace {

const char* const names[isa_count] = {"scalar", "avx2", "avx512", "avx512_bf16"};
std::atomic<int> chosen{-1};

}  // namespace

const char* isa_name(Isa isa) { return names[static_cast<int>(isa)]; }

bool isa_available(Isa isa) {
  if (isa == Isa::scalar) return true;
#if defined(FASTRLHF_HAVE_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::avx2: return avx2;  // every processor with AVX2 has F16C
    case Isa::avx512: return avx512;
    case Isa::avx512_bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
    default: return false;
  }
#else
  return false;
#endif
}

Isa current_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = isa_count - 1;
    while (!isa_available(static_cast<Isa>(isa))) --isa;
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

void set_isa(Isa isa) { chosen.store(static_cast<int>(isa), std::memory_order_relaxed); }

}  // namespace fastrlhf
