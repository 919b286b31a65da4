// The CUDA kernels of the step as the Python module sees them: raw pointers of one device, and a queue.
#pragma once

#include <string>

#include "../common/launch_cuda.h"
#include "sde_step_arguments.h"

inline ScratchSize scratch_of(const StepArguments& s) { return s.log_prob ? scratch_of_samples(s.batch, s.size) : ScratchSize{}; }
inline ScratchSize scratch_of(const NormalArguments&) { return {}; }

void sde_draw(const StepArguments&, const Queue&);
void sde_replay(const StepArguments&, const Queue&);
void sde_replay_backward(const StepArguments&, const Queue&);
void fill_philox(const NormalArguments&, const Queue&);
std::string step_why_not(int device);
