// The clipped policy loss of a token, from the sums over its logits. For a CPU: on a device Triton's kernel serves.
//
//     lp = z[id] - logsumexp(z),  r = exp(lp - old)
//     loss = weight (min(exp(old - sample), is_cap) policy + kl_coef (exp(ref - lp) - (ref - lp) - 1) - entropy_coef entropy)
//     policy = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); at most -A dual_clip where A < 0
#pragma once

#include "../common/clip.h"
#include "../common/latent.h"

constexpr double kLargestLogRatio = 20;  // of either sign; beyond it the ratio is constant

struct TokenObjective {
  double kl_coef, entropy_coef, log_low, log_high, log_dual, is_cap;
};

// What is given of one token: absent where the pointer of all is null.
struct Token {
  double advantage, weight;
  const float *old, *ref, *sample;
};

struct TokenTerm {
  double loss, ratio, kl;
  double slope, entropy_slope;  // of loss, in lp and in minus the entropy
  bool is_clipped;
};

static inline TokenTerm token_term(const TokenObjective& o, const Token& t, double log_prob, double entropy) {
  const double old = t.old ? *t.old : log_prob, full = log_prob - old;
  const double log_ratio = full > kLargestLogRatio ? kLargestLogRatio : full < -kLargestLogRatio ? -kLargestLogRatio : full;
  const Clipped policy = clipped(ClipRange<double>{o.log_low, o.log_high}, t.advantage, log_ratio);
  const bool is_capped = t.advantage < 0 && log_ratio > o.log_dual, is_clipped = policy.is_low || policy.is_high || is_capped;
  double loss = is_capped ? -t.advantage * exp(o.log_dual) : policy.value;
  double slope = is_clipped || full > kLargestLogRatio || full < -kLargestLogRatio ? 0 : loss;
  if (t.sample) {
    const double correction = exp(old - *t.sample);
    loss *= correction > o.is_cap ? o.is_cap : correction;
    slope *= correction > o.is_cap ? o.is_cap : correction;
  }
  double kl = 0;
  if (t.ref) {
    const double drift = *t.ref - log_prob, grown = expm1(drift);
    kl = grown - drift;
    loss += o.kl_coef * kl;
    slope -= o.kl_coef * grown;
  }
  loss -= o.entropy_coef * entropy;
  return {t.weight * loss, exp(log_ratio), kl, t.weight * slope, t.weight * o.entropy_coef, is_clipped};
}

// ---- what the kernels take ----

struct TokenArguments {
  int64_t rows, size;      // tokens, and the vocabulary
  Latent logits;           // (rows, size), before softcap and temperature; overwritten with their gradient where one is wanted
  const int64_t* ids;      // (rows,), as all that follow
  const float* exact;      // the logit of each id in float32; nullptr: the stored one is
  float temperature, cap;  // cap 0: no softcap
  TokenObjective objective;
  const float *old, *advantage, *weight, *ref, *sample;
  float *log_prob, *ratio, *kl, *entropy, *loss;
  bool* clipped;
  bool wants_gradient;
  float *largest, *log_total;  // of the normalizer: written by token_log_prob, read by token_gradient
  const float* grad;           // token_gradient only
  int threads;
};

#define FK_KERNELS_OF_token_loss(X) \
  X(token_policy, TokenArguments)   \
  X(token_log_prob, TokenArguments) \
  X(token_gradient, TokenArguments)
