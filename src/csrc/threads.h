// Threads for the CPU kernels.
//
// They come from the OpenMP runtime that torch has already loaded (GOMP_parallel, found at run time; libgomp, libomp
// and libiomp5 all export it), so that our workers and torch's are the same threads: a second pool would wait
// milliseconds behind torch's spinning ones. After a fork that pool is gone and would hang, so a child starts plain
// threads for each call; so does a process without OpenMP.
#pragma once

#include <cstdint>

namespace fastrlhf {

// Calls body(context, worker) on `workers` threads, the caller being one of them, and waits.
void run_workers(int workers, void (*body)(void*, int), void* context);

// Hands out 0 .. n-1 one after another.
class Counter {
 public:
  explicit Counter(int64_t n) : n_(n) {}
  bool next(int64_t& i) {
    i = __atomic_fetch_add(&at_, 1, __ATOMIC_RELAXED);
    return i < n_;
  }

 private:
  int64_t at_ = 0, n_;
};

// body(task, worker) for every task. Tasks go to whoever is free, so a result must depend on its task alone.
template <class Body>
inline void parallel_for(int64_t tasks, int workers, Body&& body) {
  if (workers > tasks) workers = static_cast<int>(tasks);
  if (workers <= 1) {
    for (int64_t i = 0; i < tasks; ++i) body(i, 0);
    return;
  }
  struct Shared { Body& body; Counter counter; } shared{body, Counter(tasks)};
  run_workers(workers, [](void* p, int worker) {
    auto& s = *static_cast<Shared*>(p);
    for (int64_t i; s.counter.next(i);) s.body(i, worker);
  }, &shared);
}

// Below this many element visits a second thread costs more than it brings.
inline int worthwhile(int threads, int64_t elements) { return elements < 32768 ? 1 : threads; }

}  // namespace fastrlhf
