#include "xxh3.h"

#include <cstring>

#include "../isa.h"

#if defined(FASTRLHF_HAVE_X86)
#include <immintrin.h>
#endif

namespace fastrlhf {
namespace {

constexpr uint64_t prime32_1 = 0x9E3779B1, prime32_2 = 0x85EBCA77, prime32_3 = 0xC2B2AE3D;
constexpr uint64_t prime64_1 = 0x9E3779B185EBCA87, prime64_2 = 0xC2B2AE3D27D4EB4F, prime64_3 = 0x165667B19E3779F9,
                   prime64_4 = 0x85EBCA77C2B2AE63, prime64_5 = 0x27D4EB2F165667C5;
constexpr int stripe = 64, stripes = 16, secret_size = 192;

alignas(64) constexpr unsigned char secret[secret_size] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb,
    0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb,
    0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8,
    0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8,
    0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17,
    0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f,
    0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

inline uint64_t read64(const unsigned char* p) { uint64_t x; std::memcpy(&x, p, 8); return x; }
inline uint32_t read32(const unsigned char* p) { uint32_t x; std::memcpy(&x, p, 4); return x; }

inline uint64_t fold(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t avalanche(uint64_t h) {
  h ^= h >> 37;
  h *= 0x165667919E3779F9;
  return h ^ (h >> 32);
}

inline uint64_t avalanche64(uint64_t h) {
  h = (h ^ (h >> 33)) * prime64_2;
  h = (h ^ (h >> 29)) * prime64_3;
  return h ^ (h >> 32);
}

inline uint64_t mix16(const unsigned char* p, const unsigned char* s) { return fold(read64(p) ^ read64(s), read64(p + 8) ^ read64(s + 8)); }

uint64_t small(const unsigned char* p, int64_t n) {
  const auto size = static_cast<uint64_t>(n);
  if (n == 0) return avalanche64(read64(secret + 56) ^ read64(secret + 64));
  if (n <= 3) {
    const uint32_t word = static_cast<uint32_t>(p[0]) << 16 | static_cast<uint32_t>(p[n >> 1]) << 24 | p[n - 1] | static_cast<uint32_t>(n) << 8;
    return avalanche64(static_cast<uint64_t>(word) ^ (read32(secret) ^ read32(secret + 4)));
  }
  if (n <= 8) {
    uint64_t h = (read32(p + n - 4) + (static_cast<uint64_t>(read32(p)) << 32)) ^ (read64(secret + 8) ^ read64(secret + 16));
    h ^= (h << 49 | h >> 15) ^ (h << 24 | h >> 40);
    h *= 0x9FB21C651E98DF25;
    h ^= (h >> 35) + size;
    h *= 0x9FB21C651E98DF25;
    return h ^ (h >> 28);
  }
  if (n <= 16) {
    const uint64_t low = read64(p) ^ (read64(secret + 24) ^ read64(secret + 32));
    const uint64_t high = read64(p + n - 8) ^ (read64(secret + 40) ^ read64(secret + 48));
    return avalanche(size + __builtin_bswap64(low) + high + fold(low, high));
  }
  uint64_t sum = size * prime64_1;
  if (n <= 128) {
    for (int64_t i = (n - 1) / 32; i >= 0; --i) sum += mix16(p + 16 * i, secret + 32 * i) + mix16(p + n - 16 * (i + 1), secret + 32 * i + 16);
    return avalanche(sum);
  }
  for (int i = 0; i < 8; ++i) sum += mix16(p + 16 * i, secret + 16 * i);
  sum = avalanche(sum);
  for (int i = 8; i < n / 16; ++i) sum += mix16(p + 16 * i, secret + 16 * (i - 8) + 3);
  return avalanche(sum + mix16(p + n - 16, secret + 136 - 17));
}

// Sums over whole stripes of 64 bytes, copied on the way. A block is 16 stripes; `last` has not yet been scrambled.
using Sums = uint64_t[8];

void stripe_scalar(Sums& a, const unsigned char* p, const unsigned char* s) {
  for (int i = 0; i < 8; ++i) {
    const uint64_t word = read64(p + 8 * i), key = word ^ read64(s + 8 * i);
    a[i ^ 1] += word;
    a[i] += (key & 0xFFFFFFFF) * (key >> 32);
  }
}

void scramble_scalar(Sums& a) {
  for (int i = 0; i < 8; ++i) a[i] = (a[i] ^ (a[i] >> 47) ^ read64(secret + secret_size - stripe + 8 * i)) * prime32_1;
}

// All stripes but the last, which may overlap the one before it.
void sum_scalar(Sums& a, const unsigned char* p, int64_t count, unsigned char* dst, bool) {
  if (dst) std::memcpy(dst, p, static_cast<size_t>(count) * stripe);
  for (int64_t i = 0; i < count; ++i) {
    stripe_scalar(a, p + i * stripe, secret + 8 * (i % stripes));
    if (i % stripes == stripes - 1) scramble_scalar(a);
  }
}

#if defined(FASTRLHF_HAVE_X86)
template <bool copied, bool stream>
__attribute__((target("avx2"))) void sum_avx2(Sums& a, const unsigned char* p, int64_t count, unsigned char* dst) {
  __m256i sum[2] = {_mm256_loadu_si256(reinterpret_cast<__m256i*>(a)), _mm256_loadu_si256(reinterpret_cast<__m256i*>(a + 4))};
  for (int64_t i = 0; i < count; ++i) {
    const unsigned char* s = secret + 8 * (i % stripes);
    _mm_prefetch(reinterpret_cast<const char*>(p + i * stripe + 1024), _MM_HINT_T0);
    for (int half = 0; half < 2; ++half) {
      const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i * stripe + 32 * half));
      if (copied) {
        auto* to = reinterpret_cast<__m256i*>(dst + i * stripe + 32 * half);
        if (stream) _mm256_stream_si256(to, word);
        else _mm256_storeu_si256(to, word);
      }
      const __m256i key = _mm256_xor_si256(word, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + 32 * half)));
      const __m256i product = _mm256_mul_epu32(key, _mm256_shuffle_epi32(key, _MM_SHUFFLE(0, 3, 0, 1)));
      sum[half] = _mm256_add_epi64(_mm256_add_epi64(sum[half], _mm256_shuffle_epi32(word, _MM_SHUFFLE(1, 0, 3, 2))), product);
    }
    if (i % stripes != stripes - 1) continue;
    const __m256i prime = _mm256_set1_epi32(static_cast<int>(prime32_1));
    for (int half = 0; half < 2; ++half) {
      const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret + secret_size - stripe + 32 * half));
      const __m256i x = _mm256_xor_si256(_mm256_xor_si256(sum[half], _mm256_srli_epi64(sum[half], 47)), key);
      const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), prime);
      sum[half] = _mm256_add_epi64(_mm256_mul_epu32(x, prime), _mm256_slli_epi64(high, 32));
    }
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(a), sum[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(a + 4), sum[1]);
}

template <bool copied, bool stream>
__attribute__((target("avx512f"))) void sum_avx512(Sums& a, const unsigned char* p, int64_t count, unsigned char* dst) {
  __m512i sum = _mm512_loadu_si512(a);
  for (int64_t i = 0; i < count; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(p + i * stripe + 1024), _MM_HINT_T0);
    const __m512i word = _mm512_loadu_si512(p + i * stripe);
    if (copied) {
      if (stream) _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i * stripe), word);
      else _mm512_storeu_si512(dst + i * stripe, word);
    }
    const __m512i key = _mm512_xor_si512(word, _mm512_loadu_si512(secret + 8 * (i % stripes)));
    const __m512i product = _mm512_mul_epu32(key, _mm512_srli_epi64(key, 32));
    sum = _mm512_add_epi64(_mm512_add_epi64(sum, _mm512_shuffle_epi32(word, _MM_PERM_BADC)), product);
    if (i % stripes != stripes - 1) continue;
    const __m512i prime = _mm512_set1_epi32(static_cast<int>(prime32_1));
    const __m512i x = _mm512_xor_si512(_mm512_xor_si512(sum, _mm512_srli_epi64(sum, 47)), _mm512_loadu_si512(secret + secret_size - stripe));
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), prime);
    sum = _mm512_add_epi64(_mm512_mul_epu32(x, prime), _mm512_slli_epi64(high, 32));
  }
  _mm512_storeu_si512(a, sum);
}

__attribute__((target("avx2"))) void stream_avx2(unsigned char* dst, const unsigned char* src, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(src + i + 1024), _MM_HINT_T0);
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i), a);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i + 32), b);
  }
}

template <bool copied, bool stream>
void sum_x86(Sums& a, const unsigned char* p, int64_t count, unsigned char* dst) {
  if (current_isa() >= Isa::avx512) return sum_avx512<copied, stream>(a, p, count, dst);
  sum_avx2<copied, stream>(a, p, count, dst);
}
#endif

void sum(Sums& a, const unsigned char* p, int64_t count, unsigned char* dst, bool stream) {
#if defined(FASTRLHF_HAVE_X86)
  if (current_isa() >= Isa::avx2) {
    if (!dst) return sum_x86<false, false>(a, p, count, nullptr);
    if (stream && reinterpret_cast<uintptr_t>(dst) % stripe == 0) return sum_x86<true, true>(a, p, count, dst);
    return sum_x86<true, false>(a, p, count, dst);
  }
#endif
  sum_scalar(a, p, count, dst, stream);
}

}  // namespace

uint64_t xxh3(const void* src, int64_t n, void* dst, bool stream) {
  const auto* p = static_cast<const unsigned char*>(src);
  auto* to = static_cast<unsigned char*>(dst);
  if (n <= 240) {
    if (to) std::memcpy(to, p, static_cast<size_t>(n));
    return small(p, n);
  }
  Sums a = {prime32_3, prime64_1, prime64_2, prime64_3, prime64_4, prime32_2, prime64_5, prime32_1};
  const int64_t whole = (n - 1) / stripe;
  sum(a, p, whole, to, stream);
  if (to) std::memcpy(to + whole * stripe, p + whole * stripe, static_cast<size_t>(n - whole * stripe));
  stripe_scalar(a, p + n - stripe, secret + secret_size - stripe - 7);
  uint64_t h = static_cast<uint64_t>(n) * prime64_1;
  for (int i = 0; i < 4; ++i) h += fold(a[2 * i] ^ read64(secret + 11 + 16 * i), a[2 * i + 1] ^ read64(secret + 11 + 16 * i + 8));
  return avalanche(h);
}

void copy_streaming(void* dst, const void* src, int64_t n) {
#if defined(FASTRLHF_HAVE_X86)
  if (current_isa() >= Isa::avx2 && n >= 4096) {
    auto* to = static_cast<unsigned char*>(dst);
    const auto* from = static_cast<const unsigned char*>(src);
    const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63), body = (n - head) & ~int64_t{63};
    std::memcpy(to, from, static_cast<size_t>(head));
    stream_avx2(to + head, from + head, body);
    std::memcpy(to + head + body, from + head + body, static_cast<size_t>(n - head - body));
    return;
  }
#endif
  std::memcpy(dst, src, static_cast<size_t>(n));
}

void streamed() {
#if defined(FASTRLHF_HAVE_X86)
  _mm_sfence();
#endif
}

}  // namespace fastrlhf
