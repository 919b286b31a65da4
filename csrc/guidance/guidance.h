// Guidance that keeps every token's length: g = uncond + w (velocity - uncond), out = g |velocity| / |g|, the lengths of a token.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/latent.h"
#include "../common/platform.h"

// |velocity| / |g| of a token from its sums of squares. NaN, or infinite, where |g| is 0: such a token has no direction.
FK_INLINE double length_ratio(double of_velocity, double of_guided) { return std::sqrt(of_velocity / of_guided); }

// The gradient of one element, from the gradient `grad` of its result: along = sum(g grad) / sum(g^2) of its token.
struct TokenSlopes {
  float in_guided, in_length;
};

FK_INLINE TokenSlopes token_slopes(float ratio, float along, float velocity, float guided, float grad) {
  return {ratio * (grad - along * guided),
          ratio > 0 ? along / ratio * velocity : 0.0f};  // |velocity| is not smooth at 0: 0, as torch has it
}

// ---- what the kernels take ----

struct GuidanceArguments {
  int64_t batch;
  int64_t channels, rows, width;    // of a latent: its first dimension, those between together, its last one
  int64_t patch_rows, patch_width;  // a token is so many neighboring rows and columns of all channels
  Latent velocity, velocity_uncond;
  float guidance_scale;
  Latent out;                          // float32
  Latent grad_out, grad, grad_uncond;  // backward only; grad_out is float32, grad_uncond may be absent
  int threads;                         // of a CPU
};

// Its kernels, on a CPU.
#define FK_KERNELS_OF_guidance(X)         \
  X(rescaled_guidance, GuidanceArguments) \
  X(rescaled_guidance_backward, GuidanceArguments)
