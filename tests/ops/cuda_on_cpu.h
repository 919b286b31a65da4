// Enough of CUDA to run the kernels of csrc/ on a CPU: their sources are compiled as C++ with this header in front, and linked to
// cuda_on_cpu.cpp.
//
// Blocks run one after the other, in an order the test chooses; the threads of a block take turns, and switch where CUDA's threads
// would wait for each other. Only what the kernels use is here, and every use of it is by whole warps or blocks.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
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

// The runtime: one device, no errors; or what stub_driver/runtime_on_stub.cpp has in its place.
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
struct cudaFuncAttributes {};
void* current_context();
void set_current_context(void* context);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace cuda_on_cpu {

struct Index {
  unsigned x;
};
inline Index thread_index, block_index, block_size, grid_size;
inline uint64_t exchange[1024];  // what a lane shows to its warp
inline bool misaligned = false;

void launch(const char* name, unsigned blocks, unsigned threads, cudaStream_t stream, const std::function<void()>& thread);
void wait_for_block();
void wait_for_warp();
void count_step();  // a ballot or a strong load: a loop over samples makes one of them at each turn

// What `lane` of this warp shows.
template <class T>
T shown_by(T mine, unsigned lane) {
  static_assert(sizeof(T) <= 8);
  wait_for_warp();
  std::memcpy(&exchange[thread_index.x], &mine, sizeof mine);
  wait_for_warp();
  T theirs;
  std::memcpy(&theirs, &exchange[thread_index.x / 32 * 32 + lane], sizeof theirs);
  return theirs;
}

}  // namespace cuda_on_cpu

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size
// `name` is an argument of csrc's own launch.
#define FK_LAUNCH(kernel, blocks, threads, stream, arguments) cuda_on_cpu::launch(name, blocks, threads, stream, [&] { kernel(arguments); })

inline void __syncthreads() { cuda_on_cpu::wait_for_block(); }
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
  for (unsigned lane = 0; lane < 32; ++lane) votes |= unsigned(cuda_on_cpu::exchange[threadIdx.x / 32 * 32 + lane] & 1) << lane;
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
  if (reinterpret_cast<uintptr_t>(address) % 16) cuda_on_cpu::misaligned = true;
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
