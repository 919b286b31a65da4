// How a CPU kernel walks latents: samples are cut into segments (the unit of threading) and chunks (what fits in L1).
//
// Sums run over fixed lanes, chunks and segments, so a sample's sum depends on its elements alone: not on the batch, the threads
// or the vector width.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "dtype_cpu.h"

namespace FK_ISA {

constexpr int64_t kChunk = 1024;
constexpr int64_t kSegment = 16 * kChunk;
constexpr int64_t kAhead = 3 * kChunk;  // how far to prefetch
constexpr int kSumLanes = 32;

FK_INLINE int64_t segments_of(int64_t size) { return (size + kSegment - 1) / kSegment; }

constexpr int64_t kPerThread = 8 * kChunk;  // elements worth waking a thread for

// Runs body(sample, segment, begin, end) over all segments of all samples, in parallel.
template <class Body>
void for_segments(int64_t batch, int64_t size, int threads, Body body) {
  const int64_t segments = segments_of(size), tasks = batch * segments;
  const int team = int(std::min({int64_t(threads), tasks, batch * size / kPerThread}));
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t sample = task / segments, segment = task % segments;
    body(sample, segment, segment * kSegment, std::min(size, (segment + 1) * kSegment));
  }
}

// Where a chunk lies: a run of elements of one row.
struct Place {
  int64_t row, first, count;
};

// Runs body(place, segment) over all chunks of all rows, segments in parallel.
template <class Body>
void for_chunks(int64_t rows, int64_t size, int threads, Body body) {
  for_segments(rows, size, threads, [&](int64_t row, int64_t segment, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kChunk) body(Place{row, first, std::min(kChunk, end - first)}, segment);
  });
}

// Asks for what a chunk further on will read, a little at a time while this one is computed: the hardware's own prefetcher stops
// at every page and idles while noise is made (docs/log.md has the measurement).
FK_INLINE void prefetch_ahead(const Latent& latent, int64_t sample, int64_t element, int64_t count) {
  if (!latent.data) return;
  const char* ahead = latent.at(sample, element + kAhead);
  for (int64_t byte = 0; byte < count * bytes_of(latent.dtype); byte += 64) __builtin_prefetch(ahead + byte);
}
constexpr auto kNoPrefetch = [](int64_t, int64_t) {};

// A chunk as float32: the data itself, or a copy in buffer. nullptr where the latent is absent.
FK_INLINE const float* load(const Latent& latent, int64_t index, const Place& at, float* buffer) {
  return latent.data ? widen(latent.at(index, at.first), latent.dtype, at.count, buffer) : nullptr;
}

// The sum of the lanes, as a tree: a chain of 32 additions costs a fifth of a pass.
FK_INLINE double total_of(const float (&lanes)[kSumLanes]) {
  double total[kSumLanes];
  for (int l = 0; l < kSumLanes; ++l) total[l] = lanes[l];
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) total[l] += total[l + half];
  return total[0];
}

// Sums residual(i)^2 over i in [0, count), element i in lane i % kSumLanes; ahead(i, n) is called before elements i .. i + n - 1.
template <class Residual, class Ahead>
FK_INLINE double sum_of_squares(int64_t count, Residual residual, Ahead ahead) {
  float lanes[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    ahead(i, kSumLanes);
#pragma omp simd
    for (int l = 0; l < kSumLanes; ++l) {
      const float r = residual(i + l);
      lanes[l] += r * r;
    }
  }
  for (int l = 0; i + l < count; ++l) {
    const float r = residual(i + l);
    lanes[l] += r * r;
  }
  return total_of(lanes);
}

// Several sums over i in [0, count) in one pass: *sums[n] += the sum of the n-th term(i), in lanes as above.
template <class Ahead, class... Term>
FK_INLINE void lane_sums(int64_t count, Ahead ahead, std::initializer_list<double*> sums, Term... term) {
  float lanes[sizeof...(Term)][kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    ahead(i, kSumLanes);
#pragma omp simd
    for (int l = 0; l < kSumLanes; ++l) {
      int n = 0;
      ((lanes[n++][l] += term(i + l)), ...);
    }
  }
  for (int l = 0; i + l < count; ++l) {
    int n = 0;
    ((lanes[n++][l] += term(i + l)), ...);
  }
  for (size_t n = 0; n < sizeof...(Term); ++n) *sums.begin()[n] += total_of(lanes[n]);
}

}  // namespace FK_ISA
