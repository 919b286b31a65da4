// What every CUDA file needs: the language, and launches whose errors become exceptions.
//
// The sources use little of CUDA, so that tests/ops/cuda_on_cpu.h can run them on a CPU: warps and blocks in step, shared memory,
// full-warp shuffles and ballots, one atomic.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "launch_cuda.h"
#include "platform.h"

#if defined(__CUDACC__)
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FK_DEVICE static __device__ __forceinline__
#define FK_ALIGNED(address) (address)  // of 128 bits; on a CPU it is looked at
#define FK_LAUNCH(kernel, blocks, threads, stream, arguments) kernel<<<blocks, threads, 0, stream>>>(arguments)
constexpr int64_t kEnoughBlocks = 1024;  // that fill a large device
#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

static inline void check_cuda(const char* what, cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("flowkern: ") + what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

#if defined(__CUDACC__)
// A function of the driver, found by the runtime: nothing is linked to it, so the module imports where there is none.
template <class Function>
Function* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &status);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &status);
#endif
  check_cuda(name, error);
  return reinterpret_cast<Function*>(found);
}
static inline void* current_context() {
  static auto* const get = driver_function<CUresult(CUcontext*)>("cuCtxGetCurrent");
  CUcontext context = nullptr;
  return get(&context) == CUDA_SUCCESS ? context : nullptr;
}
static inline void set_current_context(void* context) {
  static auto* const set = driver_function<CUresult(CUcontext)>("cuCtxSetCurrent");
  set(static_cast<CUcontext>(context));
}
#endif

// Makes a device the current one for as long as it lives. It is set in any case: this runtime is a copy of its own, and what it takes
// for current may not be what torch's copy does. Then the driver's current context is that of before, which both go by.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    before_ = current_context();
    check_cuda("cudaSetDevice", cudaSetDevice(device));
  }
  ~OnDevice() {
    if (before_ && current_context() != before_) set_current_context(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  void* before_ = nullptr;  // none, where nobody has used a device yet: then this one may stay
};

template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int threads, const Queue& queue) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string("flowkern: ") + name + ": expected fewer than 2**31 tiles, got " + std::to_string(blocks));
  const OnDevice guard(queue.device);
  FK_LAUNCH(kernel, unsigned(blocks), unsigned(threads), reinterpret_cast<cudaStream_t>(queue.stream), arguments);
  check_cuda(name, cudaGetLastError());
}

// Divides the index of a block, below 2**31, by a number of the launch. A multiplication: the quotient stays in registers that a warp
// shares, and so does what addresses have in common.
struct Divisor {
  unsigned by = 1, multiplier = 0;
  int shift = 0;
};

inline Divisor divisor(int64_t by) {
  int log = 0;
  while (int64_t{1} << log < by) ++log;
  return {unsigned(by), unsigned(((uint64_t{1} << (31 + log)) + by - 1) / by), 31 + log};
}

FK_DEVICE unsigned quotient(unsigned index, const Divisor& divisor) {
  return unsigned(uint64_t{index} * divisor.multiplier >> divisor.shift);
}

// What a kernel is compiled for. A plain call has latents of one dtype; a loss that is plain has samples with velocity rows of their own,
// and no guidance.
enum class Calls : int { any, plain_float32, plain_bfloat16 };

// A kernel, compiled for each.
template <class Arguments>
struct Kernels {
  void (*for_calls[3])(Arguments);
};

// Why these kernels cannot run on a device; empty where they can. It loads them: the first launch may be captured into a graph.
template <class Arguments>
std::string load_kernels(int device, std::initializer_list<Kernels<Arguments>> all) try {
  const OnDevice guard(device);
  cudaFuncAttributes attributes;
  for (const auto& kernels : all)
    for (const auto kernel : kernels.for_calls)
      check_cuda("loading the kernels", cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  return "";
} catch (const std::runtime_error& error) {
  return error.what();
}

// Counts one arrival and returns how many came before: what the arrived wrote is seen by the last of them.
FK_DEVICE int arrive(int* arrivals) {
#if defined(__CUDACC__)
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(arrivals) : "memory");
  return before;
#else
  return (*arrivals)++;
#endif
}
