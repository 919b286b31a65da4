// What the kernels of the matching losses take, on every device. A tensor that is not given is not read.
#pragma once

#include "../common/latent.h"
#include "../common/philox.h"
#include "matching_loss.h"

struct MatchingArguments {
  int64_t batch, rows;
  const int64_t* row;                       // (batch,) the velocity row of each sample; nullptr: sample b has row b
  const int64_t *order, *first;             // of many samples on a device: order[first[r]] to order[first[r + 1]] have row r
  Latent velocity, old_velocity, ref, ema;  // (rows, size)
  Latent x0, noise;                         // (batch, size); noise absent: drawn from key
  NoiseKey key;
  MatchingRule rule;

  const float *sigma, *advantage;              // (batch,); no sigma: sigma_value for all
  float sigma_value;
  bool is_reduced;                             // loss is one number, not (batch,)
  float *loss, *log_ratio, *ratio, *matching;  // (batch,)
  float *ref_mean, *ema_mean;                  // (batch,)
  bool *clipped_low, *clipped_high;            // (batch,)
  // On a CPU, (rows, size) of float32, where row b has sample b alone: velocity - u. Forward writes it; given to backward, it takes the
  // place of x0 and noise, and becomes the gradient.
  Latent residual;
  float* slopes;                               // (batch, 4)

  const float* grad;  // backward: of the loss, (batch,), or one number: grad_stride 0
  int64_t grad_stride;
  Latent grad_velocity;  // (rows, size)
  int threads;           // of a CPU
};

struct NoisingArguments {
  int64_t batch, size;
  Latent x0, noise, out;
  NoiseKey key;
  const float* sigma;  // (batch,)
  int threads;
};
