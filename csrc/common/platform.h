// What every native file needs to compile for a CPU of any vector width and for CUDA from the same formulas.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FK_INLINE static __host__ __device__ __forceinline__
#else
#define FK_INLINE static inline __attribute__((always_inline))
#endif

// A CPU source is compiled once per instruction set, each into a namespace of its own (see setup.py).
#ifndef FK_ISA
#define FK_ISA baseline
#endif
