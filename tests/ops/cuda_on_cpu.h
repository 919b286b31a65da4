// Enough of CUDA to run the kernels of csrc/ on a CPU: a test compiles the .cu sources as C++ with this header in front.
//
// Blocks run one after the other, in an order the test chooses; the threads of a block are fibers that take turns, and switch
// where CUDA's threads would wait for each other. Only what the kernels use is here, and every use of it is by whole warps or blocks.
#pragma once

#include <immintrin.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__ static
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define FK_DEVICE static inline
constexpr int64_t kEnoughBlocks = 4;  // few, so that a block takes several samples of a row

namespace cuda_on_cpu {

struct Index {
  unsigned x;
};
inline Index thread_index, block_index, block_size, grid_size;

// A point where a group of threads (a warp, the block) waits until all of it has come.
struct Barrier {
  unsigned waiting = 0, generation = 0;
};

struct Block {
  std::vector<ucontext_t> fibers;
  std::vector<std::vector<char>> stacks;
  std::vector<char> done;
  ucontext_t scheduler;
  unsigned current = 0;
  Barrier block, warps[32];
  uint64_t exchange[1024];  // what a lane shows to its warp
  unsigned steps[1024];     // ballots and strong loads of a thread: a loop over samples makes one of them at each turn
  bool moved = false;  // since the scheduler looked
  bool misaligned = false;
  std::function<void()> body;
};
inline Block now;
inline unsigned most_steps = 0;  // of any thread

inline void count_step() { most_steps = std::max(most_steps, ++now.steps[thread_index.x]); }

inline void run_fiber() {
  now.body();
  now.done[now.current] = now.moved = true;
  swapcontext(&now.fibers[now.current], &now.scheduler);
}

inline void let_others_run() { swapcontext(&now.fibers[now.current], &now.scheduler); }

inline void wait_at(Barrier& barrier, unsigned count) {
  const unsigned generation = barrier.generation;
  if (++barrier.waiting == count) {
    barrier.waiting = 0;
    ++barrier.generation;
    now.moved = true;
  }
  while (barrier.generation == generation) let_others_run();
}

inline void wait_for_warp() { wait_at(now.warps[thread_index.x / 32], 32); }

// What `lane` of this warp shows.
template <class T>
T shown_by(T mine, unsigned lane) {
  static_assert(sizeof(T) <= 8);
  wait_for_warp();
  std::memcpy(&now.exchange[thread_index.x], &mine, sizeof mine);
  wait_for_warp();
  T theirs;
  std::memcpy(&theirs, &now.exchange[thread_index.x / 32 * 32 + lane], sizeof theirs);
  return theirs;
}

// Whether blocks, and warps, take their turns the other way round.
inline bool backwards() { return std::getenv("CUDA_ON_CPU_BACKWARDS") != nullptr; }

inline void run_block(unsigned threads) {
  now.stacks.resize(threads, std::vector<char>(1 << 16));
  now.fibers.resize(threads);
  now.done.assign(threads, 0);
  now.block = {};
  std::memset(now.steps, 0, sizeof now.steps);
  for (Barrier& warp : now.warps) warp = {};
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&now.fibers[t]);
    now.fibers[t].uc_stack = {now.stacks[t].data(), 0, now.stacks[t].size()};
    now.fibers[t].uc_link = nullptr;
    makecontext(&now.fibers[t], run_fiber, 0);
  }
  // A warp runs on until it has to wait for another: so that a barrier that is missing shows.
  for (bool running = true; running;) {
    running = false;
    bool any_moved = false;
    for (unsigned w = 0; w < threads / 32; ++w) {
      const unsigned warp = backwards() ? threads / 32 - 1 - w : w;
      do {
        now.moved = false;
        for (unsigned t = 32 * warp; t < 32 * warp + 32; ++t) {
          if (now.done[t]) continue;
          running = true;
          now.current = thread_index.x = t;
          swapcontext(&now.scheduler, &now.fibers[t]);
        }
        any_moved = any_moved || now.moved;
      } while (now.moved);
    }
    if (running && !any_moved) throw std::runtime_error("cuda_on_cpu: threads wait for others that have left");
  }
}

template <class Kernel, class Arguments>
void run(Kernel kernel, unsigned blocks, unsigned threads, const Arguments& arguments) {
  if (threads == 0 || threads % 32 || threads > 1024 || blocks == 0) throw std::runtime_error("cuda_on_cpu: invalid configuration");
  block_size = {threads};
  grid_size = {blocks};
  now.body = [&] { kernel(arguments); };
  now.misaligned = false;
  for (unsigned b = 0; b < blocks; ++b) {
    block_index = {backwards() ? blocks - 1 - b : b};
    run_block(threads);
  }
  if (now.misaligned) throw std::runtime_error("cuda_on_cpu: a 128-bit access that is not aligned");
}

}  // namespace cuda_on_cpu

// For the tests: the longest loop over samples since the last call.
extern "C" __attribute__((visibility("default"), used)) inline unsigned cuda_on_cpu_most_steps() {
  return std::exchange(cuda_on_cpu::most_steps, 0u);
}

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size
#define FK_LAUNCH(kernel, blocks, threads, stream, arguments) ((void)(stream), cuda_on_cpu::run(kernel, blocks, threads, arguments))

inline void __syncthreads() { cuda_on_cpu::wait_at(cuda_on_cpu::now.block, blockDim.x); }
inline void __syncwarp() { cuda_on_cpu::wait_for_warp(); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_on_cpu::shown_by(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::shown_by(value, threadIdx.x % 32 ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  cuda_on_cpu::count_step();
  unsigned votes = 0;
  cuda_on_cpu::shown_by(unsigned(vote), 0);
  for (unsigned lane = 0; lane < 32; ++lane) votes |= unsigned(cuda_on_cpu::now.exchange[threadIdx.x / 32 * 32 + lane] & 1) << lane;
  return votes;
}
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// Memory: one thread at a time, so everything is seen at once.
template <class T>
T __ldcg(const T* address) {
  cuda_on_cpu::count_step();
  return *address;
}
// A device would stop where 128 bits are not aligned.
#define FK_ALIGNED(address) aligned(address)
struct uint4 {
  uint32_t x, y, z, w;
};
template <class T>
T* aligned(T* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) cuda_on_cpu::now.misaligned = true;
  return address;
}

// Numbers of 16 bits.
inline float __uint_as_float(uint32_t bits) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(int(bits)))); }
inline uint32_t __float_as_uint(float value) { return uint32_t(_mm_cvtsi128_si32(_mm_castps_si128(_mm_set_ss(value)))); }
struct Half {
  uint16_t bits;
};
struct __half2 {
  Half x, y;
};
struct __nv_bfloat162 {
  Half x, y;
};
inline Half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(Half half) { return half.bits; }
inline uint16_t __bfloat16_as_ushort(Half half) { return half.bits; }
inline float __half2float(Half half) { return _cvtsh_ss(half.bits); }
inline __half2 __floats2half2_rn(float x, float y) { return {{uint16_t(_cvtss_sh(x, 0))}, {uint16_t(_cvtss_sh(y, 0))}}; }
inline Half to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  return {uint16_t(value != value ? 0x7FFFu : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {to_bfloat16(x), to_bfloat16(y)}; }

// The runtime: one device, no errors.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
struct cudaFuncAttributes {};
inline void* current_context() { return nullptr; }
inline void set_current_context(void*) {}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
