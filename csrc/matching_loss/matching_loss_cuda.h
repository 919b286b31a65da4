// The CUDA kernels of the matching losses as the Python module sees them: raw pointers of one device, and a queue.
#pragma once

#include <string>

#include "../common/launch_cuda.h"
#include "matching_loss_arguments.h"

constexpr int kMatchingSums = 6;  // per sample, in matching_loss_cuda.cu

inline ScratchSize scratch_of(const MatchingArguments& m) {
  return m.loss ? scratch_of_loss(m.batch, m.rule.size, kMatchingSums) : ScratchSize{};  // the backward pass has no loss
}
inline ScratchSize scratch_of(const NoisingArguments&) { return {}; }

void matching_forward(const MatchingArguments&, const Queue&);
void matching_backward(const MatchingArguments&, const Queue&);
void add_noise(const NoisingArguments&, const Queue&);
std::string matching_why_not(int device);
