// Normals for a run of elements, many Philox counters at a time: the same words as philox4x32_10, in vector registers.
#pragma once

#include "philox.h"

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace FK_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef uint64_t Word64 __attribute__((vector_size(kVectorBytes)));  // each 64-bit lane holds a 32-bit word in its low half
constexpr int kLanes = kVectorBytes / 8;

// Full products of the low halves.
FK_INLINE Word64 multiply_low_halves(Word64 a, Word64 b) {
#if defined(__AVX512F__)
  return (Word64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Word64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Word64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFull) * (b & 0xFFFFFFFFull);
#endif
}

// The high halves of the lanes, moved to their low halves. A shuffle: shifts share the multiplier's port.
FK_INLINE Word64 high_halves(Word64 a) {
#if defined(__AVX512F__)
  return (Word64)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB);
#elif defined(__AVX2__)
  return (Word64)_mm256_shuffle_epi32((__m256i)a, 0xF5);
#else
  return a >> 32;
#endif
}

FK_INLINE Word64 lane_number() {
  Word64 number{};
  for (int lane = 0; lane < kLanes; ++lane) number[lane] = lane;
  return number;
}

constexpr int kInFlight = 4;                       // vectors advanced together, to hide the multiplier's latency
constexpr int kBlocksAtOnce = kInFlight * kLanes;  // Philox counters per call
constexpr int kNormalsAtOnce = 4 * kBlocksAtOnce;  // normals per call: 128, 64 or 32

// The keys of the ten rounds, each across a vector: made once for many counters.
struct RoundKeys {
  Word64 first[10], second[10];
  explicit RoundKeys(uint64_t seed) {
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
      first[round] = Word64{} + key0;
      second[round] = Word64{} + key1;
    }
  }
};

// Normals of elements 4 first_block .. 4 first_block + kNormalsAtOnce - 1.
FK_INLINE void normals_at_once(float* out, uint32_t first_block, uint32_t word, uint64_t sample_id, const RoundKeys& keys) {
  Word64 c0[kInFlight], c1[kInFlight], c2[kInFlight], c3[kInFlight];
  for (int j = 0; j < kInFlight; ++j) {
    c0[j] = lane_number() + (first_block + j * kLanes);
    c1[j] = Word64{} + word;
    c2[j] = Word64{} + uint32_t(sample_id);
    c3[j] = Word64{} + (sample_id >> 32);
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    for (int j = 0; j < kInFlight; ++j) {
      const Word64 p0 = multiply_low_halves(c0[j], Word64{} + 0xD2511F53u);
      const Word64 p1 = multiply_low_halves(c2[j], Word64{} + 0xCD9E8D57u);
      c0[j] = high_halves(p1) ^ c1[j] ^ keys.first[round];  // high halves carry rubbish that no product reads
      c1[j] = p1;
      c2[j] = high_halves(p0) ^ c3[j] ^ keys.second[round];
      c3[j] = p0;
    }
  }
  alignas(64) uint32_t radius_bits[2 * kBlocksAtOnce], angle_bits[2 * kBlocksAtOnce];
  for (int j = 0; j < kInFlight; ++j) {
    const Word64 radius = (c0[j] & 0xFFFFFFFFull) | (c2[j] << 32);
    const Word64 angle = (c1[j] & 0xFFFFFFFFull) | (c3[j] << 32);
    std::memcpy(radius_bits + j * 2 * kLanes, &radius, kVectorBytes);
    std::memcpy(angle_bits + j * 2 * kLanes, &angle, kVectorBytes);
  }
#pragma omp simd
  for (int i = 0; i < 2 * kBlocksAtOnce; ++i) {
    const Normal2 pair = box_muller(radius_bits[i], angle_bits[i]);
    out[2 * i] = pair.first;
    out[2 * i + 1] = pair.second;
  }
}

// Normals of elements first .. first + count - 1 of a sample (first a multiple of 4); out has room for count rounded up to kNormalsAtOnce.
// ahead(i, n) is called before normals i .. i + n - 1 are made: the place to ask for memory that is needed afterwards.
template <class Ahead>
FK_INLINE void fill_normals(float* out, int64_t first, int64_t count, const NoiseKey& key, int64_t sample, Ahead ahead) {
  const uint32_t word = counter_word(key, sample);
  const uint64_t sample_id = uint64_t(key.sample_id[sample]);
  const RoundKeys keys(key.seed);
  for (int64_t i = 0; i < count; i += kNormalsAtOnce) {
    ahead(i, kNormalsAtOnce);
    normals_at_once(out + i, uint32_t((first + i) / 4), word, sample_id, keys);
  }
}

}  // namespace FK_ISA
