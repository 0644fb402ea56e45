// bfloat16 and float16 to and from float, one element at a time, without any instruction set. In an unnamed namespace: files
// compiled for different instruction sets each keep their own copy.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace fastrlhf { namespace {

FASTRLHF_HOST_DEVICE inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
FASTRLHF_HOST_DEVICE inline uint16_t float_to_bf16(float f) {  // nearest even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
FASTRLHF_HOST_DEVICE inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u) {
    bits = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
  } else if (rest >= 0x400u) {
    bits = sign | ((rest + 0x1c000u) << 13);
  } else {  // subnormal: a multiple of 2^-24
    float f = static_cast<float>(rest) * 5.9604644775390625e-08f;
    std::memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
FASTRLHF_HOST_DEVICE inline uint16_t float_to_half(float f) {  // nearest even
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00u;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or more
  if (bits < 0x38800000u) {                         // subnormal: adding 0.5 leaves the rounded multiple of 2^-24
    float g;
    std::memcpy(&g, &bits, 4);
    g += 0.5f;
    uint32_t b;
    std::memcpy(&b, &g, 4);
    return sign | static_cast<uint16_t>(b - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13);
}

}}  // namespace
