#include "shim.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

namespace shim {

Thread* current = nullptr;

namespace {

constexpr size_t stack_bytes = 64 * 1024;

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
  int any = 0, result = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][32];  // by turns: a lane may be at the next exchange while another still reads this one
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> space;
  unsigned char* memory = nullptr;
};

struct Fiber {
  Thread thread{};
  Block* block = nullptr;
  Warp* warp = nullptr;
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  bool done = false;
  int turn = 0;
};

const std::function<void()>* body = nullptr;
std::vector<Fiber> fibers;
std::vector<Block> blocks_;
Barrier cluster;
Fiber* active = nullptr;
void* scheduler = nullptr;
std::vector<unsigned char*> stacks;
uint64_t progress = 0;  // barriers passed and threads ended
uint64_t runs = 0;      // of clusters, in all launches

// Threads go on from the first to the last, and in every other cluster from the last to the first: what depends on the order
// shows. CUDA_HOST_ORDER=forward or reverse: the same in all.
bool reversed() {
  static const char* order = std::getenv("CUDA_HOST_ORDER");
  return order ? order[0] == 'r' : runs++ % 2 == 1;
}

#if !defined(__x86_64__)
#error "the host build of the CUDA kernels switches stacks on x86-64 only"
#endif

// Saves what a call preserves, and goes on on another stack.
extern "C" void fastrlhf_shim_switch(void** from, void* to);
__asm__(R"(
.text
.globl fastrlhf_shim_switch
.type fastrlhf_shim_switch, @function
fastrlhf_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastrlhf_shim_switch, .-fastrlhf_shim_switch
)");

void leave() { fastrlhf_shim_switch(&active->stack_pointer, scheduler); }

void entry() {
  (*body)();
  active->done = true;
  leave();
  std::abort();
}

void resume(Fiber& f) {
  active = &f;
  current = &f.thread;
  fastrlhf_shim_switch(&scheduler, f.stack_pointer);
}

void wait(Barrier& b, int x = 0) {
  b.any |= x;
  const uint64_t mine = b.generation;
  if (++b.arrived == b.expected) {
    b.arrived = 0;
    b.result = b.any;
    b.any = 0;
    ++b.generation;
    ++progress;
    return;
  }
  while (b.generation == mine) leave();
  ++progress;
}

}  // namespace

unsigned char* block_memory() { return active->thread.memory; }
unsigned char* cluster_memory(const void* here, unsigned rank) {
  return blocks_[rank].memory + (static_cast<const unsigned char*>(here) - active->thread.memory);
}
void went_on() { ++progress; }
void yield() { leave(); }
void block_barrier() { wait(active->block->barrier); }
int block_or(int x) {
  wait(active->block->barrier, x);
  const int result = active->block->barrier.result;  // the next barrier's result comes only after all have read this one:
  wait(active->block->barrier);
  return result;
}
void cluster_barrier() { wait(cluster); }

const uint64_t* exchange(uint64_t mine) {
  Warp& w = *active->warp;
  uint64_t* values = w.values[active->turn ^= 1];
  values[active->thread.thread.x & 31] = mine;
  wait(w.barrier);
  return values;
}

void run(int64_t blocks, int threads, int64_t shared_bytes, int cluster_size, const std::function<void()>& kernel) {
  if (threads % 32 != 0 || blocks % cluster_size != 0) throw std::runtime_error("a launch of odd size");
  const int count = threads * cluster_size;
  while (static_cast<int>(stacks.size()) < count)
    stacks.push_back(static_cast<unsigned char*>(mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  body = &kernel;
  for (int64_t first = 0; first < blocks; first += cluster_size) {
    blocks_.clear();
    blocks_.resize(cluster_size);
    fibers.assign(count, Fiber{});
    cluster = Barrier{};
    cluster.expected = count;
    for (int r = 0; r < cluster_size; ++r) {
      Block& block = blocks_[r];
      block.barrier.expected = threads;
      block.warps.resize(threads / 32);
      for (Warp& w : block.warps) w.barrier.expected = 32;
      block.space.reset(new unsigned char[shared_bytes + 2048]);
      std::memset(block.space.get(), 0xa5, shared_bytes + 2048);  // shared memory holds anything at first
      block.memory = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block.space.get()) + 1023) / 1024 * 1024);
      for (int t = 0; t < threads; ++t) {
        Fiber& f = fibers[r * threads + t];
        f.block = &block;
        f.warp = &block.warps[t / 32];
        f.thread = {{static_cast<unsigned>(t)}, {static_cast<unsigned>(first + r)}, {static_cast<unsigned>(threads)}, {static_cast<unsigned>(blocks)},
                    static_cast<unsigned>(r), block.memory};
        f.stack = stacks[r * threads + t];
        auto* top = reinterpret_cast<uint64_t*>(f.stack + stack_bytes - 64);
        *--top = 0;                                       // the alignment that a call leaves
        *--top = reinterpret_cast<uint64_t>(&entry);
        for (int i = 0; i < 6; ++i) *--top = 0;
        f.stack_pointer = top;
      }
    }
    const bool backwards = reversed();
    for (int left = count; left > 0;) {
      const uint64_t before = progress;
      for (int i = 0; i < count; ++i) {
        Fiber& f = fibers[backwards ? count - 1 - i : i];
        if (f.done) continue;
        resume(f);
        if (f.done) --left, ++progress;
      }
      if (progress == before) throw std::runtime_error("the threads of a block wait at different barriers");
    }
  }
  active = nullptr;
  current = nullptr;
}

}  // namespace shim
