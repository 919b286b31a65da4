// One affine Gaussian step, per element: the formula of every sampler, shared by CPU and CUDA.
//
//     mean = a x_t + b velocity (+ sum_j h_j history_j),   x_next = mean + std noise,   log_prob = mean_D(-k (x_next - mean)^2) + c
//
// Compiled without contraction, so that every backend rounds the mean and x_next alike (docs/numerics.md).
#pragma once

#include "../common/platform.h"

// A row of flowkern.schedules.Coefficients in float32; the order is that of schedules.COLUMNS.
struct StepRow {
  float a, b, std, k, c, h[3], sigma;
};
static_assert(sizeof(StepRow) == 9 * sizeof(float), "rows are read by address");

FK_INLINE float guided_velocity(float velocity, float uncond, float guidance_scale) {
  return uncond + guidance_scale * (velocity - uncond);
}

FK_INLINE float step_mean(const StepRow& row, float x_t, float velocity) { return row.a * x_t + row.b * velocity; }

FK_INLINE float step_draw(const StepRow& row, float mean, float noise) { return mean + row.std * noise; }

FK_INLINE float predicted_x0(const StepRow& row, float x_t, float velocity) { return x_t - row.sigma * velocity; }

// The log-probability of a sample from the sum over its D elements of (x_next - mean)^2.
FK_INLINE float step_log_prob(const StepRow& row, double sum_of_squares, int64_t size) {
  return float(double(row.c) - double(row.k) * (sum_of_squares / double(size)));
}

// d log_prob / d velocity of one element, times the gradient that comes in: scale = grad 2 k b guidance_scale / D.
FK_INLINE float step_gradient(float scale, float x_next, float mean) { return scale * (x_next - mean); }
