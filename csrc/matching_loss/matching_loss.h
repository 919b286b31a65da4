// The matching losses, shared by CPU and CUDA: what is summed over the elements of a sample, and the loss and the slopes that
// follow from the sums. docs/ops/matching_loss.md has the derivation.
//
//     u = noise - x0,  residual = velocity - u,  M = mean_D(residual^2),  t = sigma
//     awm:  log p = -M | -t M | -t^2 M | -t (sqrt(M + 1e-10) - 1e-5) | -(t / p) ((M + 1e-10)^p - (1e-10)^p)
//           loss = clipped -advantage exp(log p - log p_old)
//     nft:  loss = 5 t^2 / b (r mean(plus^2) / w+ + (1 - r) mean(minus^2) / w-),  plus, minus = old +- b (velocity - old) - u
#pragma once

#include "../common/clip.h"
#include "../common/latent.h"
#include "../common/philox.h"

enum MatchingWeighting : int { kUniform = 0, kT = 1, kGhuber = 2, kTSquared = 3, kHuber = 4 };  // of awm
enum NftWeighting : int { kAdaptive = 0, kEqual = 1 };

struct MatchingRule {
  int64_t size;  // elements of a sample
  bool nft, has_old;
  int weighting;  // MatchingWeighting, or NftWeighting
  double ghuber_power, nft_beta;
  float mix;  // nft_beta where nft's velocities are mixed of the new and the old one, else 1
  double ref_coef, ema_coef, clip_low, clip_high;
  double share;  // of a sample in the loss: 1 / batch for a mean, else 1
};

// ---- an element ----

FK_INLINE float target_velocity(float noise, float x0) { return noise - x0; }

FK_INLINE float noised(float sigma, float x0, float noise) { return (1.0f - sigma) * x0 + sigma * noise; }

// As far from the old velocity as nft_beta says; at 1 it is the velocity, bit for bit, and needs no old one.
FK_INLINE float mixed(float velocity, float old, float mix) { return mix == 1.0f ? velocity : old + mix * (velocity - old); }

// The velocity as far on the other side of the old one.
FK_INLINE float reflected(float velocity, float old) { return 2.0f * old - velocity; }

FK_INLINE float squared_difference(float a, float b) { return (a - b) * (a - b); }

// residual^2 - old_residual^2 without forming the difference of two numbers that may be almost equal.
FK_INLINE float matching_drift(float velocity, float old, float u) { return (velocity - old) * ((velocity - u) + (old - u)); }

// ---- a sample ----

// Sums over the elements of a sample; those that a loss does not use stay 0.
struct MatchingSums {
  double squares;      // (velocity - u)^2
  double old_squares;  // awm with old: (old - u)^2;  nft with old: (reflected - u)^2, of the mixed velocity, as squares
  double drift;        // awm with old: matching_drift
  double sizes;        // nft: |velocity - u|
  double old_sizes;    // nft with old: |reflected - u|
  double ref, ema;     // squared_difference of the velocity and its anchor
};

struct MatchingResult {
  double loss;
  float log_ratio, ratio, matching, ref, ema;
  bool clipped_low, clipped_high;
  float slopes[4];  // of velocity - u, reflected - u, velocity - ref, velocity - ema in the gradient
};

constexpr double kGhuberEps = 1e-10, kGhuberPower = 0.25;  // the published power, of which roots are taken

FK_INLINE double fourth_root(double x) { return sqrt(sqrt(x)); }

// log p - log p_old. With fourth roots a - b = (a^4 - b^4) / ((a^2 + b^2) (a + b)): the difference is divided, never formed. With
// another power it is made of the change of log M, from M itself where 1 + change has lost its digits.
FK_INLINE double awm_log_ratio(const MatchingRule& rule, double t, double m, double m_old, double drift) {
  if (rule.weighting == kUniform) return -drift;
  if (rule.weighting == kT) return -t * drift;
  if (rule.weighting == kTSquared) return -t * t * drift;
  m += kGhuberEps;
  m_old += kGhuberEps;
  if (rule.weighting == kHuber) return -t * drift / (sqrt(m) + sqrt(m_old));
  if (rule.ghuber_power == kGhuberPower) return -4.0 * t * drift / ((sqrt(m) + sqrt(m_old)) * (fourth_root(m) + fourth_root(m_old)));
  const double p = rule.ghuber_power, change = drift / m_old;
  const double log_change = change < -0.5 ? log(m / m_old) : log1p(change);
  return -t / p * pow(m_old, p) * expm1(p * log_change);
}

// d log p / d M.
FK_INLINE double awm_slope(const MatchingRule& rule, double t, double m) {
  if (rule.weighting == kUniform) return -1.0;
  if (rule.weighting == kT) return -t;
  if (rule.weighting == kTSquared) return -t * t;
  m += kGhuberEps;
  if (rule.weighting == kHuber) return -t / (2.0 * sqrt(m));
  if (rule.ghuber_power != kGhuberPower) return -t * pow(m, rule.ghuber_power - 1.0);
  const double root = fourth_root(m);
  return -t / (root * root * root);
}

// On policy log_ratio is exactly 0, but NaN where M is NaN.
FK_INLINE void awm_loss(const MatchingRule& rule, double t, double advantage, const MatchingSums& mean, MatchingResult& result) {
  double log_ratio = mean.squares == mean.squares ? 0.0 : mean.squares;
  if (rule.has_old) log_ratio = awm_log_ratio(rule, t, mean.squares, mean.old_squares, mean.drift);
  const Clipped clip = clipped(clip_range<double>(rule.clip_low, rule.clip_high), advantage, log_ratio);
  result.clipped_low = clip.is_low;
  result.clipped_high = clip.is_high;
  result.log_ratio = float(log_ratio);
  result.ratio = float(exp(log_ratio));
  result.matching = float(mean.squares);
  result.loss = clip.value;
  if (!(clip.is_low || clip.is_high))
    result.slopes[0] = float(clip.value * awm_slope(rule, t, mean.squares) * 2.0 * rule.share / double(rule.size));
}

// Residuals are normalized by their own mean size, which has no gradient, or not at all. nft_beta is in no slope: what it divides
// the loss by, the mixed velocities have as their own.
FK_INLINE void nft_loss(const MatchingRule& rule, double t, double advantage, const MatchingSums& mean, MatchingResult& result) {
  double r = 0.5 + 0.5 * advantage;
  r = r < 0.0 ? 0.0 : r > 1.0 ? 1.0 : r;  // NaN stays
  const double minus_squares = rule.has_old ? mean.old_squares : mean.squares;
  double plus = t * mean.sizes, minus = t * (rule.has_old ? mean.old_sizes : mean.sizes);
  plus = plus < 1e-5 ? 1e-5 : plus;
  minus = minus < 1e-5 ? 1e-5 : minus;
  if (rule.weighting == kEqual) plus = minus = 1.0;
  const double plus_weight = r * t * t / plus, minus_weight = (1.0 - r) * t * t / minus;
  const double matching = plus_weight * mean.squares + minus_weight * minus_squares;
  const double scale = 5.0 * 2.0 * rule.share / double(rule.size);
  result.ratio = 1.0f;
  result.matching = float(matching);
  result.loss = 5.0 * matching / rule.nft_beta;
  // Without an old velocity both residuals are one, and their slopes become one.
  result.slopes[0] = float(scale * (rule.has_old ? plus_weight : plus_weight - minus_weight));
  result.slopes[1] = rule.has_old ? float(-scale * minus_weight) : 0.0f;
}

// The loss of a sample and its slopes, from its sums, but for its anchors. size 0: all means are 0.
FK_INLINE MatchingResult matching_result(MatchingRule rule, float sigma, float advantage, const MatchingSums& sums) {
  if (rule.size == 0) rule.size = 1;
  const double d = double(rule.size);
  const MatchingSums mean{sums.squares / d, sums.old_squares / d, sums.drift / d, sums.sizes / d, sums.old_sizes / d, 0, 0};
  MatchingResult result{};
  if (rule.nft) nft_loss(rule, sigma, advantage, mean, result);
  else awm_loss(rule, sigma, advantage, mean, result);
  return result;
}

// ---- what the kernels take ----
// A tensor that is not given is not read.

struct MatchingArguments {
  int64_t batch, rows;
  const int64_t* row;                       // (batch,) the velocity row of each sample; nullptr: sample b has row b
  const int64_t *order, *first;             // of many samples on a device: order[first[r]] to order[first[r + 1]] have row r
  Latent velocity, old_velocity, ref, ema;  // (rows, size)
  Latent x0, noise;                         // (batch, size); noise absent: drawn from key
  NoiseKey key;
  MatchingRule rule;

  const float *sigma, *advantage;    // (batch,); no sigma: sigma_value for all
  const float *ref_coef, *ema_coef;  // (batch,), or nullptr: the rule's for all
  float sigma_value;
  bool is_reduced;                             // loss is one number, not (batch,)
  float *loss, *log_ratio, *ratio, *matching;  // (batch,)
  float *ref_mean, *ema_mean;                  // (batch,)
  bool *clipped_low, *clipped_high;            // (batch,)
  // (rows, size) of float32, where row b has sample b alone: velocity - u. Forward writes it; given to backward, it takes the
  // place of x0 and noise, and becomes the gradient.
  Latent residual;
  float* slopes;  // (batch, 4)

  const float* grad;  // backward: of the loss, (batch,), or one number: grad_stride 0
  int64_t grad_stride;
  Latent grad_velocity;  // (rows, size)
  int threads;           // of a CPU
};

FK_INLINE MatchingResult matching_result(const MatchingArguments& m, int64_t sample, const MatchingSums& sums) {
  return matching_result(m.rule, m.sigma ? m.sigma[sample] : m.sigma_value, m.advantage[sample], sums);
}

FK_INLINE void add_anchors(const MatchingArguments& m, int64_t sample, const MatchingSums& sums, MatchingResult& result) {
  const double ref_coef = m.ref_coef ? m.ref_coef[sample] : m.rule.ref_coef, ema_coef = m.ema_coef ? m.ema_coef[sample] : m.rule.ema_coef;
  const double d = m.rule.size > 0 ? double(m.rule.size) : 1.0, ref = sums.ref / d, ema = sums.ema / d;
  result.ref = float(ref);
  result.ema = float(ema);
  result.loss += ref_coef * ref + ema_coef * ema;
  result.slopes[2] = float(ref_coef * 2.0 * m.rule.share / d);
  result.slopes[3] = float(ema_coef * 2.0 * m.rule.share / d);
}

struct NoisingArguments {
  int64_t batch, size;
  Latent x0, noise, out;
  NoiseKey key;
  const float* sigma;  // (batch,)
  int threads;
};

// Its kernels, on every device.
#define FK_KERNELS_OF_matching_loss(X)    \
  X(matching_forward, MatchingArguments)  \
  X(matching_backward, MatchingArguments) \
  X(add_noise, NoisingArguments)
