// What the kernels of the step take, on every device. A tensor that is not given is not read.
#pragma once

#include "../common/latent.h"
#include "../common/philox.h"

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
  Latent grad;  // backward only
  int threads;  // of a CPU
};

struct NormalArguments {
  int64_t batch, size;
  float* out;
  NoiseKey key;
  int threads;
};
