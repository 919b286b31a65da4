// The CPU kernels of the matching losses as the Python module sees them: raw pointers, one instance per instruction set.
#pragma once

#include "../common/chunks_cpu.h"
#include "matching_loss_arguments.h"

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
