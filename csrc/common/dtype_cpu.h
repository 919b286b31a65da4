// Latents of three dtypes, computed on as float32: a run of elements is widened into, or rounded out of, a small buffer.
#pragma once

#include <cstring>

#include "latent.h"
#include "philox.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace FK_ISA {

// Round to nearest even, as torch rounds; NaN stays a NaN.
FK_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? uint16_t(0x7FC0u) : uint16_t(rounded);
}

FK_INLINE float from_bfloat16(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }

// float16 in integer arithmetic: compilers differ in what they know of the type. Vectors go through F16C where there is one.
FK_INLINE float from_float16(uint16_t bits) {
  const uint32_t magnitude = bits & 0x7FFFu;
  uint32_t wide = (magnitude << 13) + (112u << 23);                                          // the exponent's bias: 127 - 15
  if (magnitude >= 0x7C00u) wide = 0x7F800000u | (magnitude << 13);                          // infinity, NaN
  if (magnitude < 0x0400u) wide = float_to_bits(float(magnitude) * 5.9604644775390625e-8f);  // subnormal: steps of 2^-24
  return bits_to_float(wide | uint32_t(bits & 0x8000u) << 16);
}

FK_INLINE uint16_t to_float16(float value) {
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7FFFFFFFu;
  uint32_t half = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1)) >> 13;              // to nearest even
  if (magnitude < 0x38800000u) half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u;  // subnormal: 0.5 has steps of 2^-24
  if (magnitude >= 0x477FF000u) half = 0x7C00u;                                                      // 65,520 and more: infinity
  if (magnitude > 0x7F800000u) half = 0x7E00u;                                                       // NaN
  return uint16_t(half | (bits >> 16 & 0x8000u));
}

// The float32 values of count elements: the data itself where it is float32, else a copy in buffer.
FK_INLINE const float* widen(const void* data, DType dtype, int64_t count, float* buffer) {
  if (dtype == DType::float32) return static_cast<const float*>(data);
  const uint16_t* half = static_cast<const uint16_t*>(data);
  int64_t i = 0;
  if (dtype == DType::bfloat16) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) buffer[j] = from_bfloat16(half[j]);
    return buffer;
  }
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
#endif
  for (; i < count; ++i) buffer[i] = from_float16(half[i]);
  return buffer;
}

// Writes count float32 values to data in its dtype.
FK_INLINE void narrow(const float* values, void* data, DType dtype, int64_t count) {
  if (dtype == DType::float32) {
    std::memcpy(data, values, count * 4);
    return;
  }
  uint16_t* half = static_cast<uint16_t*>(data);
  int64_t i = 0;
  if (dtype == DType::bfloat16) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) half[j] = to_bfloat16(values[j]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), _mm256_cvtps_ph(_mm256_loadu_ps(values + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < count; ++i) half[i] = to_float16(values[i]);
}

}  // namespace FK_ISA
