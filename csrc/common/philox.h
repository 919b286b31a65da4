// The noise of flowkern: Philox-4x32-10 (Salmon et al., SC 2011) and its transform to normals, shared by CPU and CUDA.
//
// key = seed; counter = (element / 4, stream << 28 | step, sample_id low, sample_id high). One counter gives the normals of
// four neighboring elements: two Box-Muller pairs. Every operation below is an IEEE float32 operation without contraction,
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

FK_INLINE Philox4 philox4x32_10(Philox4 c, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.x;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c.z;
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

// ln(u) for u in [2^-32, 1]: u = 2^exponent (1 + t) with 1 + t in [sqrt(1/2), sqrt(2)).
FK_INLINE float log_unit(float u) {
  const uint32_t bits = float_to_bits(u) - 0x3F3504F3u;  // bits of sqrt(1/2)
  const float exponent = float(int32_t(bits) >> 23);
  const float t = bits_to_float((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = 8.700359947e-02f;
  p = p * t + -1.426747632e-01f;
  p = p * t + 1.491478702e-01f;
  p = p * t + -1.657758601e-01f;
  p = p * t + 1.996306229e-01f;
  p = p * t + -2.500133702e-01f;
  p = p * t + 3.333391077e-01f;
  const float t2 = t * t;
  const float log1p = (p * t - 0.5f) * t2 + t;
  return exponent * 0.693147180559945f + log1p;
}

struct Normal2 {
  float first, second;
};

// Box-Muller: the radius from 31 bits, the angle from 32, reduced to a quarter turn in integers.
FK_INLINE Normal2 box_muller(uint32_t radius_bits, uint32_t angle_bits) {
  const float u = float(int32_t(radius_bits >> 1)) * 4.656612873077393e-10f + 2.328306436538696e-10f;  // 2^-31, 2^-32
  const float radius = sqrtf(-2.0f * log_unit(u));
  const uint32_t turned = angle_bits + 0x20000000u;  // by an eighth: the top two bits are the nearest quarter turn
  const float y = float(int32_t(angle_bits << 2)) * 3.657295198e-10f;  // 2 pi / 2^34: within pi / 4
  const float y2 = y * y;
  const float sine = ((-1.951528210e-04f * y2 + 8.332160752e-03f) * y2 + -1.666665461e-01f) * y2 * y + y;
  const float cosine = ((2.443844968e-05f * y2 + -1.388736750e-03f) * y2 + 4.166664687e-02f) * y2 * y2 - 0.5f * y2 + 1.0f;
  const bool swap = turned & 0x40000000u;
  const uint32_t c = float_to_bits(swap ? sine : cosine) ^ ((turned + 0x40000000u) & 0x80000000u);
  const uint32_t s = float_to_bits(swap ? cosine : sine) ^ (turned & 0x80000000u);
  return {radius * bits_to_float(c), radius * bits_to_float(s)};
}
