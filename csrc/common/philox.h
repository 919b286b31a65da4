// The noise of flowkern: Philox-4x32-10 (Salmon et al., SC 2011) and its transform to normals, shared by CPU and CUDA.
//
// key = seed; counter = (element / 4, stream << 28 | step, sample_id low, sample_id high). One counter gives the normals of
// four neighboring elements: two Box-Muller pairs. Every operation below is an IEEE float32 operation, fused where it says so,
// written in the same order in every backend, so the normals agree to the bit (docs/numerics.md).
#pragma once

#include <cmath>
#include <cstring>

#include "platform.h"

// Which noise a sample gets.
struct NoiseKey {
  uint64_t seed;
  const int64_t* sample_id;  // (batch,), nullptr: no noise of our own
  const int64_t* step;       // (batch,), nullptr: step_value for all
  int64_t step_value;
  uint32_t stream;
};

// The second counter word: the stream in the top four bits, the step below (docs/numerics.md).
FK_INLINE uint32_t counter_word(const NoiseKey& key, int64_t sample) {
  const int64_t step = key.step ? key.step[sample] : key.step_value;
  return (key.stream << 28) | (uint32_t(step) & 0x0FFFFFFFu);
}

struct Philox4 {
  uint32_t x, y, z, w;
};

// a b, all 64 bits. nvcc makes one instruction of it if told so; of the product of a uint64_t it makes two.
FK_INLINE uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return uint64_t{a} * b;
#endif
}

FK_INLINE Philox4 philox4x32_10(Philox4 c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = wide_product(0xD2511F53u, c.x);
    const uint64_t p1 = wide_product(0xCD9E8D57u, c.z);
    c = {uint32_t(p1 >> 32) ^ c.y ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w ^ key1, uint32_t(p0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

FK_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

FK_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// ln(n 2^-31) for n in [1/2, 2^31]: n = 2^(31 + exponent) (1 + t) with 1 + t in [sqrt(1/2), sqrt(2)).
FK_INLINE float log_unit(float n) {
  const uint32_t bits = float_to_bits(n) - 0x4EB504F3u;  // bits of 2^31 sqrt(1/2)
  const float exponent = float(int32_t(bits) >> 23);
  const float t = bits_to_float((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = fmaf(-1.063610911e-01f, t, 1.637329757e-01f);
  p = fmaf(p, t, -1.711735427e-01f);
  p = fmaf(p, t, 1.987408698e-01f);
  p = fmaf(p, t, -2.498183101e-01f);
  p = fmaf(p, t, 3.333608806e-01f);
  p = fmaf(fmaf(p, t, -0.5f), t * t, t);
  return fmaf(exponent, 0.693147180559945f, p);
}

// sqrtf of 0 and of numbers far from the ends of float32, as the square of a radius is. On CUDA it is what nvcc makes of sqrtf, to the
// bit, without its branch for other numbers: branches keep the pairs of a thread from being computed side by side.
FK_INLINE float root(float square) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(square));
  const float near = square * inverse;
  const float rounded = fmaf(fmaf(-near, near, square), 0.5f * inverse, near);
  return square == 0.0f ? square : rounded;
#else
  return sqrtf(square);
#endif
}

struct Normal2 {
  float first, second;
};

// Box-Muller: the radius from 31 bits, the angle from 32, reduced to a quarter turn in integers.
FK_INLINE Normal2 box_muller(uint32_t radius_bits, uint32_t angle_bits) {
  const float radius = root(-2.0f * log_unit(float(int32_t(radius_bits >> 1)) + 0.5f));
  const uint32_t turned = angle_bits + 0x20000000u;                    // by an eighth: the top two bits are the nearest quarter turn
  const float y = float(int32_t(angle_bits << 2)) * 3.657295198e-10f;  // 2 pi / 2^34: within pi / 4
  const float y2 = y * y;
  const float sine = fmaf(fmaf(fmaf(-1.949563593e-04f, y2, 8.331978694e-03f), y2, -1.666665077e-01f), y2 * y, y);
  const float cosine = fmaf(fmaf(fmaf(-1.365244971e-03f, y2, 4.166127741e-02f), y2, -0.5f), y2, 1.0f);
  const bool swap = turned & 0x40000000u;
  const uint32_t c = float_to_bits(swap ? sine : cosine) ^ ((turned + 0x40000000u) & 0x80000000u);
  const uint32_t s = float_to_bits(swap ? cosine : sine) ^ (turned & 0x80000000u);
  return {radius * bits_to_float(c), radius * bits_to_float(s)};
}
