#pragma once

#include <cstdint>

namespace fastrlhf { namespace cuda {

// `copies`: (n, 6) words on the device, as refit/copy.h has them. `tiles`: (count, 5): copy, first row, rows, first byte, bytes.
int run_copies(const int64_t* copies, const int64_t* tiles, int64_t count, void* stream);

}}  // namespace
