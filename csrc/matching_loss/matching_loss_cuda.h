// The CUDA kernels of the matching losses as the Python module sees them. A tensor that is not given is not read.
#pragma once

#include <string>

#include "../common/launch_cuda.h"
#include "../common/philox.h"
#include "matching_loss.h"

constexpr int kMatchingSums = 6;  // per sample, in matching_loss_cuda.cu

struct MatchingArguments {
  int64_t batch, rows;
  const int64_t* row;                       // (batch,) the velocity row of each sample; nullptr: sample b has row b
  Latent velocity, old_velocity, ref, ema;  // (rows, size)
  Latent x0, noise;                         // (batch, size); noise absent: drawn from key
  NoiseKey key;
  MatchingRule rule;

  const float *sigma, *advantage;              // (batch,)
  bool is_reduced;                             // loss is one number: share times the sum; else (batch,)
  float *loss, *log_ratio, *ratio, *matching;  // (batch,)
  float *ref_mean, *ema_mean;                  // (batch,)
  bool *clipped_low, *clipped_high;            // (batch,)
  float* slopes;                               // (batch, 4)
  Scratch scratch;

  const float* grad;  // backward: of the loss, (batch,), or one number: grad_stride 0
  int64_t grad_stride;
  Latent grad_velocity;  // (rows, size)
};

struct NoisingArguments {
  int64_t batch, size;
  Latent x0, noise, out;
  NoiseKey key;
  const float* sigma;  // (batch,)
  int tiles;           // of a sample; set by the launch
  bool vectors;        // whether latents allow 128-bit accesses; set by the launch
};

void matching_forward(const MatchingArguments&, const Queue&);
void matching_backward(const MatchingArguments&, const Queue&);
void add_noise(NoisingArguments, const Queue&);
std::string matching_why_not(int device);
