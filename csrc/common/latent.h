// Latents as kernels take them, on every device.
#pragma once

#include <cstdint>

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

inline int64_t bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// (samples, size): elements of a sample are contiguous, samples lie `stride` elements apart.
struct Latent {
  char* data = nullptr;  // nullptr: absent
  int64_t stride = 0;
  DType dtype = DType::float32;
  char* at(int64_t sample, int64_t element) const { return data + (sample * stride + element) * bytes_of(dtype); }
};
