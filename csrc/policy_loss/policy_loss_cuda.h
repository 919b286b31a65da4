// The CUDA kernels of the policy loss as the Python module sees them: raw pointers of one device, and a queue.
#pragma once

#include <string>

#include "../common/launch_cuda.h"
#include "policy_loss_arguments.h"

constexpr int kPolicySums = 2;  // per sample: of the ratio, of the KL

inline ScratchSize scratch_of(const PolicyArguments& p) {
  return p.loss ? scratch_of_loss(p.batch, p.size, kPolicySums) : ScratchSize{};  // the backward pass has no loss
}

void policy_forward(const PolicyArguments&, const Queue&);
void policy_backward(const PolicyArguments&, const Queue&);
std::string policy_why_not(int device);
