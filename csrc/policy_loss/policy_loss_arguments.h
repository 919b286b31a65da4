// What the kernels of the policy loss take, on every device. A tensor that is not given is not read: what a call leaves out costs
// nothing.
#pragma once

#include "../common/latent.h"
#include "../common/philox.h"
#include "policy_loss.h"

enum class Reduction : int { mean = 0, sum = 1, none = 2 };

struct PolicyArguments {
  int64_t rows, batch, size;
  Latent velocity, x_t, old_velocity, velocity_uncond, velocity_ref;  // (rows, size)
  Latent x_next, noise;                                               // (batch, size)
  float guidance_scale;
  const int64_t* row;            // (batch,), nullptr: sample b has row b
  const int64_t *order, *first;  // of many samples on a device: order[first[r]] to order[first[r + 1]] have row r, in ascending order
  const float* edges;  // StepRow per sample; edge_stride 0: one for all
  int64_t edge_stride;
  NoiseKey key;
  PolicySettings settings;

  // Forward only.
  const float *advantage, *old_log_prob, *step_weight, *kl_coef;  // (batch,); nullptr: absent, and kl_value for all
  float kl_value;
  Reduction reduction;
  float *loss, *log_ratio, *ratio, *kl;
  bool *clipped_low, *clipped_high;

  // On a CPU, (rows, size) of float32, where row b has sample b alone: what slopes[0] multiplies. Forward writes it; given to backward,
  // it takes the place of x_t, x_next and noise, and becomes the gradient.
  Latent residual;
  float* slopes;      // (batch, 2): written forward, read backward
  const float* grad;  // backward only; grad_stride 0: one for all
  int64_t grad_stride;
  Latent grad_velocity;
  int threads;  // of a CPU
};
