#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace fastrlhf {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};

struct AtFork {
  AtFork() { pthread_atfork(nullptr, nullptr, [] { forked.store(true); }); }
} at_fork;

GompParallel find_gomp() {
  static std::atomic<GompParallel> found{nullptr};
  GompParallel f = found.load(std::memory_order_relaxed);
  if (!f) {
    f = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.store(f, std::memory_order_relaxed);
  }
  return f;
}

}  // namespace

void run_workers(int workers, void (*body)(void*, int), void* context) {
  GompParallel gomp = forked.load(std::memory_order_relaxed) ? nullptr : find_gomp();
  if (gomp) {
    struct Team { void (*body)(void*, int); void* context; std::atomic<int> joined; } team{body, context, {0}};
    gomp([](void* p) {
      auto* t = static_cast<Team*>(p);
      t->body(t->context, t->joined.fetch_add(1));
    }, &team, static_cast<unsigned>(workers), 0);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(workers - 1);
  try {
    for (int w = 1; w < workers; ++w) others.emplace_back(body, context, w);
  } catch (const std::system_error&) {
    // no more threads to be had: those there are share the tasks
  }
  body(context, 0);
  for (auto& t : others) t.join();
}

}  // namespace fastrlhf
