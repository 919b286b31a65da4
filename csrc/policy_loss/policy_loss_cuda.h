// The CUDA kernels of the policy loss as the Python module sees them. A tensor that is not given is not read.
#pragma once

#include <string>

#include "../common/launch_cuda.h"
#include "../common/philox.h"
#include "policy_loss.h"

constexpr int kPolicySums = 2;  // per sample: of the ratio, of the KL

struct PolicyArguments {
  int64_t rows, batch, size;
  Latent velocity, x_t, old_velocity, velocity_uncond, velocity_ref;  // (rows, size)
  Latent x_next, noise;                                               // (batch, size)
  float guidance_scale;
  const int64_t* row;  // (batch,), nullptr: sample b has row b
  const float* edges;  // StepRow per sample; edge_stride 0: one for all
  int64_t edge_stride;
  NoiseKey key;
  PolicySettings settings;

  // Forward only.
  const float *advantage, *old_log_prob, *step_weight, *kl_coef;  // (batch,); nullptr: absent, and kl_value for all
  float kl_value;
  bool is_reduced;  // loss is one number: share times the sum; else (batch,)
  double share;
  float *loss, *log_ratio, *ratio, *kl;
  bool *clipped_low, *clipped_high;
  Scratch scratch;

  float* slopes;      // (batch, 2): written forward, read backward
  const float* grad;  // backward only; grad_stride 0: one for all
  int64_t grad_stride;
  Latent grad_velocity;
};

void policy_forward(const PolicyArguments&, const Queue&);
void policy_backward(const PolicyArguments&, const Queue&);
std::string policy_why_not(int device);
