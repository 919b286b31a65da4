// The CPU kernels of the step as the Python module sees them: raw pointers, one instance per instruction set.
#pragma once

#include "../common/chunks_cpu.h"
#include "sde_step.h"
#include "sde_step_arguments.h"

#define FK_DECLARE(isa)                                        \
  namespace isa {                                              \
  void sde_draw(const StepArguments&);                         \
  void sde_replay(const StepArguments&);                       \
  void sde_replay_backward(const StepArguments&);              \
  void fill_philox(const NormalArguments&);                    \
  }
FK_DECLARE(baseline)
FK_DECLARE(avx2)
FK_DECLARE(avx512)
#undef FK_DECLARE
