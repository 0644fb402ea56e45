// Philox 4x32-10 (Salmon et al. 2011): the number for (seed, counter), whoever asks and in whatever order.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastrlhf { namespace {

// Uniform in [0, 1) with 53 bits.
FASTRLHF_HOST_DEVICE inline double philox_uniform(uint64_t seed, uint64_t counter) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(p1), c3 = static_cast<uint32_t>(p0), c0 = n0, c2 = n2;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  return static_cast<double>(((static_cast<uint64_t>(c0) << 32) | c1) >> 11) * 0x1p-53;
}

}}  // namespace
