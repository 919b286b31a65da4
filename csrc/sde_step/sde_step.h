// The step and its log-probability, shared by CPU and CUDA: log_prob = mean_D(-k (x_next - mean)^2) + c.
#pragma once

#include "../common/gaussian_step.h"

FK_INLINE float predicted_x0(const StepRow& row, float x_t, float velocity) { return x_t - row.sigma * velocity; }

// The log-probability of a sample from the sum over its D elements of (x_next - mean)^2.
FK_INLINE float step_log_prob(const StepRow& row, double sum_of_squares, int64_t size) {
  return float(double(row.c) - double(row.k) * (sum_of_squares / double(size)));
}

// d log_prob / d velocity of one element, times the gradient that comes in: scale = grad 2 k b guidance_scale / D.
FK_INLINE float step_gradient(float scale, float x_next, float mean) { return scale * (x_next - mean); }
