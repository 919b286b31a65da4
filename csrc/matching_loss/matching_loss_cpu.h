// The CPU kernels of the matching losses as the Python module sees them: raw pointers, one instance per instruction set.
#pragma once

#include "../common/chunks_cpu.h"
#include "matching_loss.h"

struct MatchingArguments {
  int64_t batch, rows;
  const int64_t* row;                              // (batch,) the velocity row of each sample; nullptr: sample b has row b
  Latent velocity, old_velocity, ref, ema;         // (rows, size)
  Latent x0, noise;                                // (batch, size); noise absent: drawn from key
  NoiseKey key;
  MatchingRule rule;
  int threads;

  const float *sigma, *advantage;                  // (batch,)
  bool is_reduced;                                 // loss is one number, not (batch,)
  float *loss, *log_ratio, *ratio, *matching;      // (batch,)
  float *ref_mean, *ema_mean;                      // (batch,)
  bool *clipped_low, *clipped_high;                // (batch,)
  float* slopes;                                   // (batch, 4)

  const float* grad;                               // backward: of the loss, (batch,), or one number: grad_stride 0
  int64_t grad_stride;
  Latent grad_velocity;                            // (rows, size)
};

struct NoisingArguments {
  int64_t batch, size;
  Latent x0, noise, out;
  NoiseKey key;
  const float* sigma;  // (batch,)
  int threads;
};

#define FK_DECLARE(isa)                               \
  namespace isa {                                     \
  void matching_forward(const MatchingArguments&);    \
  void matching_backward(const MatchingArguments&);   \
  void add_noise(const NoisingArguments&);            \
  }
FK_DECLARE(baseline)
FK_DECLARE(avx2)
FK_DECLARE(avx512)
#undef FK_DECLARE
