// The clipped policy loss, shared by CPU and CUDA: what an element adds, and what a sample's sums become.
//
//     e = x_next - mean_old,  d = b (velocity - old_velocity)
//     log_ratio = k mean_D(d (2 e - d))                        sde
//               = mean_D(e d) / std                            guard
//               = c - k mean_D((x_next - mean)^2) - old        recorded: old is a log-probability
//     kl        = (b / std)^2 / 2 mean_D((velocity - velocity_ref)^2)
//     loss      = step_weight max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) + kl_coef kl,   r = exp(log_ratio)
//
// x_next drawn again is step_draw of mean_old, or mean_old where std == 0. docs/ops/policy_loss.md has the derivation.
#pragma once

#include "../common/clip.h"
#include "../common/gaussian_step.h"
#include "../common/latent.h"
#include "../common/philox.h"
#include "../common/reduction.h"

// How the log-ratio is formed. On policy it is 0 without a sum; its gradient is that of `sde`, or of `guard` if asked for.
enum class Ratio : int { on_policy = 0, sde = 1, guard = 2, recorded = 3 };

// One element's share of the sum that log_ratio is made of.
template <Ratio kind>
FK_INLINE float ratio_term(const StepEdge& edge, float x_t, float velocity, float old_velocity, float x_next) {
  if (kind == Ratio::recorded) {
    const float residual = x_next - step_mean(edge, x_t, velocity);
    return residual * residual;
  }
  const float e = x_next - step_mean(edge, x_t, old_velocity);
  const float d = edge.b * (velocity - old_velocity);
  return kind == Ratio::guard ? e * d : d * (2.0f * e - d);
}

FK_INLINE float kl_term(float velocity, float velocity_ref) {
  const float difference = velocity - velocity_ref;
  return difference * difference;
}

// What slopes[0] multiplies in the gradient: e - d = x_next - mean(velocity), or e for a guarded ratio, from the old velocity.
FK_INLINE float ratio_residual(const StepEdge& edge, float x_t, float velocity, float x_next) {
  return x_next - step_mean(edge, x_t, velocity);
}

// What all samples of a call share.
struct PolicySettings {
  Ratio ratio;
  bool guard;  // the gradient is that of a guarded ratio, on policy too
  ClipRange<float> range;
  double slope_scale;  // share of a sample in the loss * guidance_scale / D
  int64_t size;        // D
};

// share: of a sample in the loss, 1/B for a mean, else 1. guidance_scale is 1 without guidance.
FK_INLINE PolicySettings policy_settings(Ratio ratio, bool guard, double clip_low, double clip_high, double share, double guidance_scale,
                                         int64_t size) {
  const double slope_scale = share * guidance_scale / double(size > 0 ? size : 1);
  return {ratio, guard, clip_range<float>(clip_low, clip_high), slope_scale, size};
}

struct PolicySample {
  float loss, log_ratio, ratio, kl;
  bool clipped_low, clipped_high;
  float slopes[2];  // gradient = grad (slopes[0] residual + slopes[1] (velocity - velocity_ref))
};

// A slope of +0: what it multiplies is not read, and its term is 0 whatever comes in. Of clipped samples, and of an advantage of 0
// where the sums were finite. Where no sum has looked at the data, a slope that vanishes is -0: it is multiplied, so that NaN passes.
FK_INLINE bool is_silent(float slope) { return slope == 0 && copysignf(1.0f, slope) > 0; }

// A sample's loss and slopes from its sums over D: ratio_sum of ratio_term, kl_sum of kl_term.
FK_INLINE PolicySample policy_sample(const PolicySettings& s, const StepEdge& edge, double ratio_sum, double kl_sum, float advantage,
                                     float old_log_prob, float step_weight, float kl_coef) {
  const double size = s.size > 0 ? double(s.size) : 1.0, mean = ratio_sum / size;
  const bool noisy = edge.std > 0;
  PolicySample out;
  out.log_ratio = 0.0f;
  if (s.ratio == Ratio::sde) out.log_ratio = float(edge.k * mean);
  if (s.ratio == Ratio::guard && noisy) out.log_ratio = float(mean / edge.std);
  // Rounded to float32 first, as the recorded one was: with the same velocity the difference is exactly 0.
  if (s.ratio == Ratio::recorded) out.log_ratio = float(double(edge.c) - double(edge.k) * mean) - old_log_prob;
  out.ratio = float(exp(double(out.log_ratio)));

  const Clipped clip = clipped(s.range, advantage, out.log_ratio);
  out.clipped_low = clip.is_low;
  out.clipped_high = clip.is_high;
  const double policy = clip.value * step_weight;  // and so is its slope by log_ratio
  const double residual_factor = s.guard ? (noisy ? edge.b / double(edge.std) : 0.0) : 2.0 * double(edge.k) * edge.b;
  const float slope = float(policy * residual_factor * s.slope_scale);
  const bool is_clipped = clip.is_low || clip.is_high, has_seen = s.ratio != Ratio::on_policy && (noisy || !s.guard);
  out.slopes[0] = slope != 0 && !is_clipped ? slope : has_seen || is_clipped ? 0.0f : -0.0f;

  const double b_over_std = noisy ? edge.b / double(edge.std) : 0.0;  // std == 0: no density, no KL
  const double kl = b_over_std * b_over_std / 2 * (kl_sum / size);
  out.kl = float(kl);
  out.loss = float(policy + kl_coef * kl);
  out.slopes[1] = float(kl_coef * b_over_std * b_over_std * s.slope_scale);
  return out;
}

// ---- what the kernels take ----
// A tensor that is not given is not read: what a call leaves out costs nothing.

struct PolicyArguments {
  int64_t rows, batch, size;
  Latent velocity, x_t, old_velocity, velocity_uncond, velocity_ref;  // (rows, size)
  Latent x_next, noise;                                               // (batch, size)
  float guidance_scale;
  const int64_t* row;            // (batch,), nullptr: sample b has row b
  const int64_t *order, *first;  // of many samples on a device: order[first[r]] to order[first[r + 1]] have row r, in ascending order
  const float* edges;            // StepEdge per sample; edge_stride 0: one for all
  int64_t edge_stride;
  NoiseKey key;
  PolicySettings settings;

  // Forward only.
  const float *advantage, *old_log_prob, *step_weight, *kl_coef;  // (batch,); nullptr: absent, and kl_value for all
  float kl_value;
  Reduction reduction;
  float *loss, *log_ratio, *ratio, *kl;
  bool *clipped_low, *clipped_high;

  // (rows, size) of float32, where row b has sample b alone: what slopes[0] multiplies. Forward writes it; given to backward,
  // it takes the place of x_t, x_next and noise, and becomes the gradient.
  Latent residual;
  float* slopes;      // (batch, 2): written forward, read backward
  const float* grad;  // backward only; grad_stride 0: one for all
  int64_t grad_stride;
  Latent grad_velocity;
  int threads;  // of a CPU
};

// Its kernels, on every device.
#define FK_KERNELS_OF_policy_loss(X) \
  X(policy_forward, PolicyArguments) \
  X(policy_backward, PolicyArguments)
