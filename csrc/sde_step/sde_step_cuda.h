// The CUDA kernels of the step as the Python module sees them: raw pointers of one device, and a stream.
#pragma once

#include <string>

#include "../common/launch_cuda.h"
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
  const float* grad_out;  // (batch,), backward only
  Latent grad;            // backward only
  Scratch scratch;
  int tiles;     // of a sample; set by the launch
  bool vectors;  // whether latents allow 128-bit accesses; set by the launch
};

struct NormalArguments {
  int64_t batch, size;
  float* out;
  NoiseKey key;
  int tiles;
};

void sde_draw(StepArguments, const Queue&);
void sde_replay(StepArguments, const Queue&);
void sde_replay_backward(StepArguments, const Queue&);
void fill_philox(NormalArguments, const Queue&);
std::string step_why_not(int device);
