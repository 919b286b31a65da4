// Runs what is launched on the CPU that cuda_on_cpu.h makes of it.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <memory>

#include "cuda_on_cpu.h"

// What stands for the runtime unless somebody has another one.
[[gnu::weak]] void* current_context() { return nullptr; }
[[gnu::weak]] void set_current_context(void*) {}
[[gnu::weak]] cudaError_t cudaSetDevice(int) { return cudaSuccess; }
[[gnu::weak]] cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

namespace cuda_on_cpu {
namespace {

// A point where a group of threads (a warp, the block) waits until all of it has come.
struct Barrier {
  unsigned waiting = 0, generation = 0;
};

// Of a thread of every block: it is begun once, as to switch costs little and to begin does not.
struct Fiber {
  static constexpr size_t kStack = 1 << 16;
  jmp_buf left;  // where it goes on
  std::unique_ptr<char[]> stack;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> done;
  jmp_buf scheduler;
  Barrier block, warps[32];
  unsigned steps[1024];
  bool moved = false;  // since the scheduler looked
  const std::function<void()>* thread = nullptr;
} now;
unsigned most_steps = 0;  // of any thread

// Until somebody switches back; without the signals, which would cost a call of the system.
[[gnu::noinline]] void switch_to(jmp_buf there, jmp_buf here) {
  if (_setjmp(here) == 0) _longjmp(there, 1);
}

void let_others_run() { switch_to(now.scheduler, now.fibers[thread_index.x].left); }

void run_fiber() {
  for (;;) {
    (*now.thread)();
    now.done[thread_index.x] = now.moved = true;
    let_others_run();
  }
}

[[gnu::noinline]] void begin(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  fiber.stack.reset(new char[Fiber::kStack]);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = Fiber::kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  if (_setjmp(now.scheduler) == 0) setcontext(&context);
}

void resume(Fiber& fiber) { fiber.stack ? switch_to(fiber.left, now.scheduler) : begin(fiber); }

void wait_at(Barrier& barrier, unsigned count) {
  const unsigned generation = barrier.generation;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    ++barrier.generation;
    now.moved = true;
  }
  while (barrier.generation == generation) let_others_run();
}

// Whether blocks, and warps, take their turns the other way round.
bool backwards() { return std::getenv("CUDA_ON_CPU_BACKWARDS") != nullptr; }

void run_block(unsigned threads) {
  if (now.fibers.size() < threads) now.fibers.resize(threads);
  now.done.assign(threads, 0);
  now.block = {};
  std::memset(now.steps, 0, sizeof now.steps);
  for (Barrier& warp : now.warps) warp = {};
  const bool is_backwards = backwards();
  // A warp runs on until it has to wait for another: so that a barrier that is missing shows.
  for (bool running = true; running;) {
    running = false;
    bool any_moved = false;
    for (unsigned w = 0; w < threads / 32; ++w) {
      const unsigned warp = is_backwards ? threads / 32 - 1 - w : w;
      do {
        now.moved = false;
        for (unsigned t = 32 * warp; t < 32 * warp + 32; ++t) {
          if (now.done[t]) continue;
          running = true;
          thread_index.x = t;
          resume(now.fibers[t]);
        }
        any_moved = any_moved || now.moved;
      } while (now.moved);
    }
    if (running && !any_moved) {
      now.fibers.clear();  // who waits is never woken
      throw std::runtime_error("cuda_on_cpu: threads wait for others that have left");
    }
  }
}

}  // namespace

void wait_for_block() { wait_at(now.block, block_size.x); }
void wait_for_warp() { wait_at(now.warps[thread_index.x / 32], 32); }
void count_step() { most_steps = std::max(most_steps, ++now.steps[thread_index.x]); }

[[gnu::weak]] void launch(const char*, unsigned blocks, unsigned threads, cudaStream_t, const std::function<void()>& thread) {
  if (threads == 0 || threads % 32 || threads > 1024 || blocks == 0) throw std::runtime_error("cuda_on_cpu: invalid configuration");
  block_size = {threads};
  grid_size = {blocks};
  now.thread = &thread;
  misaligned = false;
  for (unsigned b = 0; b < blocks; ++b) {
    block_index = {backwards() ? blocks - 1 - b : b};
    run_block(threads);
  }
  if (misaligned) throw std::runtime_error("cuda_on_cpu: a 128-bit access that is not aligned");
}

}  // namespace cuda_on_cpu

// For the tests: the longest loop over samples since the last call.
extern "C" __attribute__((visibility("default"))) unsigned cuda_on_cpu_most_steps() { return std::exchange(cuda_on_cpu::most_steps, 0u); }
