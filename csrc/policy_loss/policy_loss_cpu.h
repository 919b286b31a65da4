// The CPU kernels of the policy loss as the Python module sees them: raw pointers, one instance per instruction set.
#pragma once

#include "../common/chunks_cpu.h"
#include "policy_loss_arguments.h"

#define FK_DECLARE(isa)                         \
  namespace isa {                               \
  void policy_forward(const PolicyArguments&);  \
  void policy_backward(const PolicyArguments&); \
  }
FK_DECLARE(baseline)
FK_DECLARE(avx2)
FK_DECLARE(avx512)
#undef FK_DECLARE
