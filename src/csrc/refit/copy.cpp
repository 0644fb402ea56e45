#include "copy.h"

#include <cstring>
#include <vector>

#include "../threads.h"
#include "xxh3.h"

namespace fastrlhf {
namespace {

constexpr int64_t task_bytes = 1 << 20;
constexpr int64_t stream_bytes = 8 << 20;  // more than a core's cache: what is copied will not be read from there

// Pieces [first, last) of the copies, counted over all of them.
struct Task { int64_t copy, piece, pieces; };

int64_t pieces_of_row(const Copy& c) { return (c.width + hash_piece - 1) / hash_piece; }

std::vector<Task> tasks_of(const Copy* copies, int64_t count) {
  std::vector<Task> tasks;
  int64_t filled = task_bytes;
  for (int64_t i = 0; i < count; ++i) {
    const Copy& c = copies[i];
    const int64_t pieces = c.rows * pieces_of_row(c);
    if (pieces == 0) continue;
    const int64_t bytes = c.rows * c.width;
    if (filled + bytes <= task_bytes) {
      filled += bytes;
      tasks.back().pieces += pieces;
      continue;
    }
    const int64_t share = bytes > task_bytes ? (pieces * task_bytes + bytes - 1) / bytes : pieces;
    for (int64_t piece = 0; piece < pieces; piece += share) tasks.push_back({i, piece, share < pieces - piece ? share : pieces - piece});
    filled = bytes > task_bytes ? task_bytes : bytes;
  }
  return tasks;
}

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

void move(const Copy& c, int64_t row, int64_t at, int64_t bytes, bool stream) {
  const char* from = c.src + row * c.src_pitch + at;
  char* to = c.dst + row * c.dst_pitch + at;
  if (stream) return copy_streaming(to, from, bytes);
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

// Pieces [piece, end) of one copy
void run(const Copy& c, int64_t piece, int64_t end, uint64_t* hash, bool stream) {
  const int64_t per_row = pieces_of_row(c);
  uint64_t sum = 0;
  int64_t row = piece / per_row, part = piece % per_row;
  for (; piece < end; ++piece) {
    const int64_t at = part * hash_piece, bytes = c.width - at < hash_piece ? c.width - at : hash_piece;
    if (hash) {
      char* to = c.dst ? c.dst + row * c.dst_pitch + at : nullptr;
      sum += mix(xxh3(c.src + row * c.src_pitch + at, bytes, to, stream) + static_cast<uint64_t>(piece + 1) * 0x9E3779B97F4A7C15);
    } else {
      move(c, row, at, bytes, stream);
    }
    if (++part == per_row) part = 0, ++row;
  }
  if (hash) __atomic_fetch_add(hash, sum, __ATOMIC_RELAXED);
}

}  // namespace

void run_copies(const Copy* copies, int64_t count, uint64_t* hashes, int threads) {
  if (hashes) std::memset(hashes, 0, static_cast<size_t>(count) * sizeof(uint64_t));
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += copies[i].rows * copies[i].width;
  const bool stream = total >= stream_bytes;
  const std::vector<Task> tasks = tasks_of(copies, count);
  const int workers = total < stream_bytes / 8 ? 1 : threads;
  parallel_for(static_cast<int64_t>(tasks.size()), workers, [&](int64_t t, int) {
    int64_t copy = tasks[t].copy, piece = tasks[t].piece, left = tasks[t].pieces;
    while (left > 0) {
      const Copy& c = copies[copy];
      const int64_t pieces = c.rows * pieces_of_row(c), n = left < pieces - piece ? left : pieces - piece;
      if (n > 0) run(c, piece, piece + n, hashes ? hashes + copy : nullptr, stream);
      left -= n;
      piece = 0;
      ++copy;
    }
    if (stream) streamed();
  });
}

}  // namespace fastrlhf
