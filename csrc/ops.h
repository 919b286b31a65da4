// Every op, once: modules have its kernels, and a function for each of them.
#pragma once

#include "guidance/guidance.h"
#include "matching_loss/matching_loss.h"
#include "policy_loss/policy_loss.h"
#include "sde_step/sde_step.h"
#include "token_loss/token_loss.h"

#define FK_OPS(X) X(sde_step) X(policy_loss) X(matching_loss)

// X(kernel, what it takes) for all kernels of all ops: FK_KERNELS_OF_<op> is in <op>.h.
#define FK_KERNELS(X) FK_KERNELS_OF_sde_step(X) FK_KERNELS_OF_policy_loss(X) FK_KERNELS_OF_matching_loss(X)

// With those that a CPU alone has.
#define FK_CPU_KERNELS(X) FK_KERNELS(X) FK_KERNELS_OF_token_loss(X) FK_KERNELS_OF_guidance(X)
