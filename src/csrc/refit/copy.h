// A refit: many 2-D copies in one call.
#pragma once

#include <cstdint>

namespace fastrlhf {

// `rows` rows of `width` bytes; a pitch is the distance of one row's begin to the next one's.
struct Copy {
  const char* src;
  char* dst;
  int64_t rows, width, src_pitch, dst_pitch;
};

// Rows are hashed in pieces of so many bytes at most, so that the threads' shares do not matter.
constexpr int64_t hash_piece = 256 << 10;

// Runs the copies on `threads` threads. `hashes`, where given, receives for each the sum over its pieces p = 0, 1, ... of
// mix(XXH3(piece) + (p + 1) · golden): equal for equal bytes in equal places. Where copies[i].dst is null it is only hashed.
void run_copies(const Copy* copies, int64_t count, uint64_t* hashes, int threads);

}  // namespace fastrlhf
