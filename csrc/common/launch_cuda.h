// What the Python module hands to a CUDA kernel, in plain C++.
#pragma once

#include <cstdint>

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// (samples, size): elements of a sample are contiguous, samples lie `stride` elements apart.
struct Latent {
  char* data = nullptr;  // nullptr: absent
  int64_t stride = 0;
  DType dtype = DType::float32;
};

// Where a kernel runs: a device, and a stream of it.
struct Queue {
  int device = 0;
  uintptr_t stream = 0;
};

// Memory for sums over samples. Arrivals are zero before and after every launch, so nothing has to clear them.
struct Scratch {
  float* partial = nullptr;  // (samples, tiles, sums)
  int* arrivals = nullptr;   // (samples + 1,)
};

// How a sample is cut. By its size alone: tiles order the sums, and a replay in any batch must repeat them.
constexpr int kGroup = 8;  // elements that a thread takes at once: one 128-bit access of bfloat16, two of float32

inline int threads_of(int64_t size) {
  if (size <= 32 * kGroup) return 32;
  if (size <= 64 * kGroup) return 64;
  return size <= int64_t{1} << 18 ? 128 : 256;
}

inline int64_t tiles_of(int64_t size) {
  const int64_t tile = threads_of(size) * kGroup;
  return size == 0 ? 1 : (size + tile - 1) / tile;
}
