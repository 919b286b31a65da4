// What the Python module hands to a CUDA kernel besides its arguments, in plain C++.
#pragma once

#include <cstdint>

#include "latent.h"

// Memory for sums over samples. Arrivals are zero before and after every launch, so nothing has to clear them.
struct Scratch {
  float* partial = nullptr;  // (samples, tiles, sums), and what a loss adds
  int* arrivals = nullptr;   // (samples,), and what a loss adds
};

// How much of it a launch needs.
struct ScratchSize {
  int64_t floats = 0, counts = 0;
};

// Where a kernel runs: a device, and a stream of it.
struct Queue {
  int device = 0;
  uintptr_t stream = 0;
  Scratch scratch = {};
};

// Whether a launch on this queue is captured into a graph now.
bool is_capturing(const Queue& queue);

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

inline ScratchSize scratch_of_samples(int64_t batch, int64_t size) { return {batch * tiles_of(size), batch}; }

// A loss adds up its samples in blocks of so many, then the blocks: no loop runs over all samples.
constexpr int64_t kLossBlock = 1024;

inline int64_t loss_blocks(int64_t batch) { return (batch + kLossBlock - 1) / kLossBlock; }

// The blocks' sums are doubles, and come first; then the sums of tiles, then the losses of samples.
inline ScratchSize scratch_of_loss(int64_t batch, int64_t size, int sums) {
  return {2 * loss_blocks(batch) + batch * (tiles_of(size) * sums + 1), batch + loss_blocks(batch) + 1};
}
