// The CPU kernels of the step as the Python module sees them: raw pointers, one instance per instruction set.
#pragma once

#include "../common/dtype_cpu.h"
#include "sde_step.h"

// (batch, size): elements of a sample are contiguous, samples lie `stride` elements apart.
struct Latent {
  char* data = nullptr;  // nullptr: absent
  int64_t stride = 0;
  DType dtype = DType::float32;
  char* at(int64_t sample, int64_t element) const { return data + (sample * stride + element) * bytes_of(dtype); }
};

struct StepArguments {
  int64_t batch, size;
  Latent x_t, velocity, velocity_uncond, noise, x_next, x0;
  Latent history[3];
  int num_history;
  float guidance_scale;
  const float* rows;  // row_stride 0: one edge for all samples
  int64_t row_stride;
  uint64_t seed;
  const int64_t* sample_id;  // (batch,), nullptr: no noise of our own
  const int64_t* step;       // (batch,), nullptr: step_value for all
  int64_t step_value;
  uint32_t stream;
  float* log_prob;        // (batch,), nullptr: not wanted
  const float* grad_out;  // (batch,), backward only
  Latent grad;            // backward only
  int threads;
};

struct NormalArguments {
  int64_t batch, size;
  float* out;
  uint64_t seed;
  const int64_t* sample_id;
  const int64_t* step;
  int64_t step_value;
  uint32_t stream;
  int threads;
};

// The second counter word: the stream in the top four bits, the step below (docs/numerics.md).
inline uint32_t counter_word(uint32_t stream, int64_t step) { return (stream << 28) | (uint32_t(step) & 0x0FFFFFFFu); }

#define FK_DECLARE(isa)                                        \
  namespace isa {                                              \
  void sde_draw(const StepArguments&);                         \
  void sde_replay(const StepArguments&);                       \
  void sde_replay_backward(const StepArguments&);              \
  void fill_philox(const NormalArguments&);                    \
  }
FK_DECLARE(baseline)
FK_DECLARE(avx2)
FK_DECLARE(avx512)
#undef FK_DECLARE
