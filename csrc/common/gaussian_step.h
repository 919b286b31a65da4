// One affine Gaussian step, per element: the formula of every sampler, shared by all ops, CPU and CUDA.
//
//     mean = a x_t + b velocity (+ sum_j h_j history_j),   x_next = mean + std noise
//
// Compiled without contraction, so that every backend rounds the mean and x_next alike (docs/numerics.md).
#pragma once

#include "platform.h"

// An edge of flowkern.schedules.Coefficients in float32; the order is that of schedules.COLUMNS.
struct StepEdge {
  float a, b, std, k, c, h[3], sigma;
};
static_assert(sizeof(StepEdge) == 9 * sizeof(float), "edges are read by address");

FK_INLINE float guided_velocity(float velocity, float uncond, float guidance_scale) {
  return uncond + guidance_scale * (velocity - uncond);
}

FK_INLINE float step_mean(const StepEdge& edge, float x_t, float velocity) { return edge.a * x_t + edge.b * velocity; }

FK_INLINE float step_draw(const StepEdge& edge, float mean, float noise) { return mean + edge.std * noise; }
