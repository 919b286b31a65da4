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

// Makes a device the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check_cuda("cudaGetDevice", cudaGetDevice(&before_));
    if (device == before_) return;
    check_cuda("cudaSetDevice", cudaSetDevice(device));
    changed_ = true;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class Arguments>
void launch(const char* name, void (*kernel)(Arguments), const Arguments& arguments, int64_t blocks, int threads, const Queue& queue) {
  if (blocks > INT32_MAX)
    throw std::runtime_error(std::string("flowkern: ") + name + ": expected fewer than 2**31 tiles, got " + std::to_string(blocks));
  const OnDevice guard(queue.device);
  FK_LAUNCH(kernel, unsigned(blocks), unsigned(threads), reinterpret_cast<cudaStream_t>(queue.stream), arguments);
  check_cuda(name, cudaGetLastError());
}

template <class Arguments>
const void* code(void (*kernel)(Arguments)) {
  return reinterpret_cast<const void*>(kernel);
}

// Why these kernels cannot run on a device; empty where they can. It loads them: the first launch may be captured into a graph.
static inline std::string load_kernels(int device, std::initializer_list<const void*> kernels) try {
  const OnDevice guard(device);
  cudaFuncAttributes attributes;
  for (const void* kernel : kernels) check_cuda("loading the kernels", cudaFuncGetAttributes(&attributes, kernel));
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
