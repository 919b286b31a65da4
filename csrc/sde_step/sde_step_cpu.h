// The CPU kernels of the step as the Python module sees them: raw pointers, one instance per instruction set.
#pragma once

#include "../common/chunks_cpu.h"
#include "sde_step.h"

struct StepArguments {
  int64_t batch, size;
  Latent x_t, velocity, velocity_uncond, noise, x_next, x0;
  Latent history[3];
  int num_history;
  float guidance_scale;
  const float* rows;  // row_stride 0: one edge for all samples
  int64_t row_stride;
  NoiseKey key;
  float* log_prob;        // (batch,), nullptr: not wanted
  const float* grad_out;  // (batch,), backward only, grad_stride apart
  int64_t grad_stride;
  Latent grad;            // backward only
  int threads;
};

struct NormalArguments {
  int64_t batch, size;
  float* out;
  NoiseKey key;
  int threads;
};

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
