// The step on a CPU: draw, replay, its gradient. Compiled once per instruction set (FK_ISA names the instance).
//
// A sample is cut into segments (the unit of threading) and chunks (what fits in L1). Sums run over fixed lanes, chunks and
// segments, so a sample's log-probability depends on its elements alone: not on the batch, the threads or the vector width.
#include "sde_step_cpu.h"

#include <algorithm>
#include <vector>

#include "../common/noise_cpu.h"

namespace FK_ISA {
namespace {

constexpr int64_t kChunk = 1024;
constexpr int64_t kSegment = 16 * kChunk;
constexpr int64_t kAhead = 3 * kChunk;  // how far to prefetch
constexpr int kSumLanes = 32;

FK_INLINE StepRow row_of(const StepArguments& arguments, int64_t sample) {
  StepRow row;
  std::memcpy(&row, arguments.rows + sample * arguments.row_stride, sizeof row);
  return row;
}

struct Buffers {
  alignas(64) float x[kChunk], velocity[kChunk], other[kChunk], mean[kChunk], noise[kChunk], next[kChunk];
};

// Asks for what a later chunk will read, a little at a time while this one is computed: the hardware's own prefetcher stops
// at every page and idles while noise is made (docs/log.md has the measurement).
struct Prefetch {
  const StepArguments& s;
  int64_t sample, first;
  __attribute__((always_inline)) void operator()(int64_t i, int64_t count) const {
    for (const Latent* latent : {&s.x_t, &s.velocity, &s.velocity_uncond, &s.noise, &s.x_next}) {
      if (!latent->data) continue;
      const char* ahead = latent->at(sample, first + kAhead + i);
      for (int64_t byte = 0; byte < count * bytes_of(latent->dtype); byte += 64) __builtin_prefetch(ahead + byte);
    }
  }
};
constexpr auto kNoPrefetch = [](int64_t, int64_t) {};

// What a chunk reads, as float32, with guidance applied.
struct Chunk {
  const float *x, *velocity;
  StepRow row;
};

FK_INLINE Chunk load_chunk(const StepArguments& s, StepRow row, int64_t sample, int64_t first, int64_t count, Buffers& buffers) {
  const float* x = widen(s.x_t.at(sample, first), s.x_t.dtype, count, buffers.x);
  const float* velocity = widen(s.velocity.at(sample, first), s.velocity.dtype, count, buffers.velocity);
  if (s.velocity_uncond.data) {
    const float* uncond = widen(s.velocity_uncond.at(sample, first), s.velocity_uncond.dtype, count, buffers.other);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffers.velocity[i] = guided_velocity(velocity[i], uncond[i], s.guidance_scale);
    velocity = buffers.velocity;
  }
  return {x, velocity, row};
}

// The mean with its history, in the order of the formula.
FK_INLINE const float* mean_with_history(const StepArguments& s, const Chunk& chunk, int64_t sample, int64_t first, int64_t count,
                                         Buffers& buffers) {
  float* mean = buffers.mean;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) mean[i] = step_mean(chunk.row, chunk.x[i], chunk.velocity[i]);
  for (int j = 0; j < s.num_history; ++j) {
    const float* earlier = widen(s.history[j].at(sample, first), s.history[j].dtype, count, buffers.other);
    const float weight = chunk.row.h[j];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) mean[i] += weight * earlier[i];
  }
  return mean;
}

// Sums residual(i)^2 over i in [0, count), element i in lane i % kSumLanes.
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
  double sum = 0;
  for (int l = 0; l < kSumLanes; ++l) sum += lanes[l];
  return sum;
}

// Runs body(sample, first, count) -> sum over all chunks, segments in parallel, and finishes each sample's log-probability.
template <class Body>
void for_chunks(int64_t batch, int64_t size, int threads, const StepArguments* finish, Body body) {
  const int64_t segments = (size + kSegment - 1) / kSegment, tasks = batch * segments;
  std::vector<double> partial(finish ? tasks : 0);
#pragma omp parallel for schedule(static) num_threads(int(std::min<int64_t>(threads, tasks))) if (tasks > 1 && threads > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t sample = task / segments, begin = task % segments * kSegment, end = std::min(size, begin + kSegment);
    double sum = 0;
    for (int64_t first = begin; first < end; first += kChunk) sum += body(sample, first, std::min(kChunk, end - first));
    if (finish) partial[task] = sum;
  }
  if (!finish) return;
  for (int64_t sample = 0; sample < batch; ++sample) {
    double sum = 0;
    for (int64_t j = 0; j < segments; ++j) sum += partial[sample * segments + j];
    finish->log_prob[sample] = step_log_prob(row_of(*finish, sample), sum, size);
  }
}

// Writes value(i) to x_next and returns the sum of squares of what is stored, after rounding, minus mean(i).
template <class Value, class Mean, class Ahead>
FK_INLINE double store(const StepArguments& s, int64_t sample, int64_t first, int64_t count, Buffers& buffers, Value value, Mean mean,
                       Ahead ahead) {
  char* stored = s.x_next.at(sample, first);
  if (s.x_next.dtype == DType::float32) {
    float* out = reinterpret_cast<float*>(stored);
    return sum_of_squares(count, [=](int64_t i) { return (out[i] = value(i)) - mean(i); }, ahead);
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) buffers.next[i] = value(i);
  narrow(buffers.next, stored, s.x_next.dtype, count);
  const float* rounded = widen(stored, s.x_next.dtype, count, buffers.next);
  return sum_of_squares(count, [=](int64_t i) { return rounded[i] - mean(i); }, kNoPrefetch);
}

}  // namespace

void sde_draw(const StepArguments& s) {
  for_chunks(s.batch, s.size, s.threads, s.log_prob ? &s : nullptr, [&](int64_t sample, int64_t first, int64_t count) {
    Buffers buffers;
    const Prefetch prefetch{s, sample, first};
    const Chunk chunk = load_chunk(s, row_of(s, sample), sample, first, count, buffers);
    const StepRow& row = chunk.row;
    if (s.x0.data) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) buffers.other[i] = predicted_x0(row, chunk.x[i], chunk.velocity[i]);
      narrow(buffers.other, s.x0.at(sample, first), s.x0.dtype, count);
    }
    // By value: through a reference the compiler must assume that writing x_next changes the coefficients.
    const auto draw = [&, row](auto mean) __attribute__((always_inline)) {
      if (row.std == 0 || !(s.noise.data || s.sample_id))  // neither reads nor makes noise
        return store(s, sample, first, count, buffers, mean, mean, prefetch);
      const float* noise = buffers.noise;
      if (s.noise.data) {
        noise = widen(s.noise.at(sample, first), s.noise.dtype, count, buffers.noise);
      } else {
        const uint32_t word = counter_word(s.stream, s.step ? s.step[sample] : s.step_value);
        fill_normals(buffers.noise, first, count, word, uint64_t(s.sample_id[sample]), s.seed, prefetch);
      }
      const auto value = [row, mean, noise](int64_t i) { return step_draw(row, mean(i), noise[i]); };
      return s.noise.data ? store(s, sample, first, count, buffers, value, mean, prefetch)
                          : store(s, sample, first, count, buffers, value, mean, kNoPrefetch);
    };
    if (!s.num_history) return draw([chunk](int64_t i) { return step_mean(chunk.row, chunk.x[i], chunk.velocity[i]); });
    const float* mean = mean_with_history(s, chunk, sample, first, count, buffers);
    return draw([mean](int64_t i) { return mean[i]; });
  });
}

void sde_replay(const StepArguments& s) {
  for_chunks(s.batch, s.size, s.threads, &s, [&](int64_t sample, int64_t first, int64_t count) {
    Buffers buffers;
    const Chunk chunk = load_chunk(s, row_of(s, sample), sample, first, count, buffers);
    const float* next = widen(s.x_next.at(sample, first), s.x_next.dtype, count, buffers.next);
    return sum_of_squares(count, [&](int64_t i) { return next[i] - step_mean(chunk.row, chunk.x[i], chunk.velocity[i]); },
                          Prefetch{s, sample, first});
  });
}

void sde_replay_backward(const StepArguments& s) {
  for_chunks(s.batch, s.size, s.threads, nullptr, [&](int64_t sample, int64_t first, int64_t count) {
    Buffers buffers;
    const Chunk chunk = load_chunk(s, row_of(s, sample), sample, first, count, buffers);
    const StepRow& row = chunk.row;
    const float* next = widen(s.x_next.at(sample, first), s.x_next.dtype, count, buffers.next);
    const float scale =
        float(double(s.grad_out[sample]) * 2.0 * row.k * row.b * (s.velocity_uncond.data ? s.guidance_scale : 1.0f) / double(s.size));
    const bool direct = s.grad.dtype == DType::float32;
    float* out = direct ? reinterpret_cast<float*>(s.grad.at(sample, first)) : buffers.noise;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = step_gradient(scale, next[i], step_mean(row, chunk.x[i], chunk.velocity[i]));
    if (!direct) narrow(out, s.grad.at(sample, first), s.grad.dtype, count);
    return 0.0;
  });
}

void fill_philox(const NormalArguments& n) {
  for_chunks(n.batch, n.size, n.threads, nullptr, [&](int64_t sample, int64_t first, int64_t count) {
    alignas(64) float buffer[kChunk];
    const uint32_t word = counter_word(n.stream, n.step ? n.step[sample] : n.step_value);
    fill_normals(buffer, first, count, word, uint64_t(n.sample_id[sample]), n.seed, kNoPrefetch);
    std::memcpy(n.out + sample * n.size + first, buffer, count * 4);
    return 0.0;
  });
}

}  // namespace FK_ISA
