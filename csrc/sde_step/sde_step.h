// The step and its log-probability, shared by CPU and CUDA: log_prob = mean_D(-k (x_next - mean)^2) + c.
#pragma once

#include "../common/gaussian_step.h"
#include "../common/latent.h"
#include "../common/philox.h"

FK_INLINE float predicted_x0(const StepEdge& edge, float x_t, float velocity) { return x_t - edge.sigma * velocity; }

// The log-probability of a sample from the sum over its D elements of (x_next - mean)^2.
FK_INLINE float step_log_prob(const StepEdge& edge, double sum_of_squares, int64_t size) {
  return float(double(edge.c) - double(edge.k) * (sum_of_squares / double(size)));
}

// d log_prob / d velocity of one element, times the gradient that comes in: scale = grad 2 k b guidance_scale / D.
FK_INLINE float step_gradient(float scale, float residual) { return scale * residual; }

FK_INLINE float step_residual(float x_next, float mean) { return x_next - mean; }

// d mean / d velocity of one element, times the gradient that comes in: by_mean = b guidance_scale.
FK_INLINE float mean_gradient(float by_mean, float grad_mean) { return by_mean * grad_mean; }

// ---- what the kernels take ----
// A tensor that is not given is not read.

struct StepArguments {
  int64_t batch, size;
  Latent x_t, velocity, velocity_uncond, noise, x_next, x0;
  Latent history[3];
  int num_history;
  float guidance_scale;  // of a gradient from the mean: of the velocity, 1 without guidance
  const float* edges;    // edge_stride 0: one edge for all samples
  int64_t edge_stride;
  NoiseKey key;
  // (batch, size) of float32: x_next - mean. A replay writes it; given to its backward pass, it takes the place of x_t, velocity and
  // x_next, and becomes the gradient.
  Latent residual;
  // (batch, size) of float32: a draw or a replay writes it where it is wanted, and its backward pass reads it in place of x_t and velocity.
  Latent mean;
  DType rounded;          // what a float32 x_next is rounded through before it is stored; float32: as it is
  float* log_prob;        // (batch,), nullptr: not wanted
  const float* grad_out;  // (batch,), backward only, grad_stride apart
  int64_t grad_stride;
  Latent grad_mean;  // backward only: one of them may be absent
  Latent grad;       // backward only
  int threads;       // of a CPU
};

struct NormalArguments {
  int64_t batch, size;
  float* out;
  NoiseKey key;
  int threads;
};

// Its kernels, on every device.
#define FK_KERNELS_OF_sde_step(X)       \
  X(sde_draw, StepArguments)            \
  X(sde_draw_mean, StepArguments)       \
  X(sde_replay, StepArguments)          \
  X(sde_replay_mean, StepArguments)     \
  X(sde_replay_backward, StepArguments) \
  X(sde_mean_backward, StepArguments)   \
  X(fill_philox, NormalArguments)
