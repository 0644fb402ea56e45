// What lies where in Hopper's bfloat16 tiles of 64 columns and in the products of them. Plain functions: tests on the host compare
// them with CuTe's.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace fastrlhf { namespace FASTRLHF_ISA { namespace {

constexpr int tile_depth = 64;       // columns of a tile: 128 bytes
constexpr int product_depth = 16;    // columns that one product takes
constexpr int fragment_size = 128;   // a thread's accumulators of a 64 x 256 product

// A row's 16-byte chunks change places with the row: bits 4 to 6 of an address are mixed with bits 7 to 9.
FASTRLHF_HOST_DEVICE constexpr uintptr_t swizzled_address(uintptr_t address) { return address ^ ((address >> 7 & 7) << 4); }

// How a product finds rows of 128 swizzled bytes in shared memory: 8 of them are 1024 bytes. 32 bytes on are the next 16 columns.
FASTRLHF_HOST_DEVICE constexpr uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t no_leading_stride = 1, stride = 1024 >> 4, swizzle_of_128_bytes = 1;
  return (address >> 4 & 0x3fff) | no_leading_stride << 16 | stride << 32 | swizzle_of_128_bytes << 62;
}

// Row and column of the i-th accumulator of a warpgroup's thread.
FASTRLHF_HOST_DEVICE constexpr int fragment_row(int thread, int i) { return 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2); }
FASTRLHF_HOST_DEVICE constexpr int fragment_column(int thread, int i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

}}}  // namespace
