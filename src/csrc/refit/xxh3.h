// XXH3-64, without seed, as specified by the xxHash project (doc/xxhash_spec.md), and the same while copying: the copy reads
// each byte once for both.
#pragma once

#include <cstdint>

namespace fastrlhf {

// The hash of n bytes at src, which are also copied to dst where that is given. `stream` writes past the caches.
uint64_t xxh3(const void* src, int64_t n, void* dst = nullptr, bool stream = false);

// A copy alone, past the caches.
void copy_streaming(void* dst, const void* src, int64_t n);

// Waits until streamed stores can be seen by others.
void streamed();

}  // namespace fastrlhf
