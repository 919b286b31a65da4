// The step on a CPU: draw, replay, its gradient. Compiled once per instruction set (FK_ISA names the instance).
#include "sde_step.h"

#include <vector>

#include "../common/chunks_cpu.h"
#include "../common/noise_cpu.h"

namespace FK_ISA {
namespace {

FK_INLINE StepEdge edge_of(const StepArguments& arguments, int64_t sample) {
  StepEdge edge;
  std::memcpy(&edge, arguments.edges + sample * arguments.edge_stride, sizeof edge);
  return edge;
}

struct Buffers {
  alignas(64) float x[kChunk], velocity[kChunk], other[kChunk], mean[kChunk], noise[kChunk], next[kChunk];
};

struct Prefetch {
  const StepArguments& s;
  int64_t sample, first;
  __attribute__((always_inline)) void operator()(int64_t i, int64_t count) const {
    for (const Latent* latent : {&s.x_t, &s.velocity, &s.velocity_uncond, &s.noise, &s.x_next})
      prefetch_ahead(*latent, sample, first + i, count);
  }
};

// What a chunk reads, as float32, with guidance applied.
struct Chunk {
  const float *x, *velocity;
  StepEdge edge;
};

FK_INLINE Chunk load_chunk(const StepArguments& s, StepEdge edge, int64_t sample, int64_t first, int64_t count, Buffers& buffers) {
  const float* x = widen(s.x_t.at(sample, first), s.x_t.dtype, count, buffers.x);
  const float* velocity = widen(s.velocity.at(sample, first), s.velocity.dtype, count, buffers.velocity);
  if (s.velocity_uncond.data) {
    const float* uncond = widen(s.velocity_uncond.at(sample, first), s.velocity_uncond.dtype, count, buffers.other);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffers.velocity[i] = guided_velocity(velocity[i], uncond[i], s.guidance_scale);
    velocity = buffers.velocity;
  }
  return {x, velocity, edge};
}

// The mean with its history, in the order of the formula: where it is to be left, or in a buffer.
FK_INLINE const float* mean_with_history(const StepArguments& s, const Chunk& chunk, int64_t sample, int64_t first, int64_t count,
                                         Buffers& buffers) {
  float* const mean = s.mean.data ? reinterpret_cast<float*>(s.mean.at(sample, first)) : buffers.mean;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) mean[i] = step_mean(chunk.edge, chunk.x[i], chunk.velocity[i]);
  for (int j = 0; j < s.num_history; ++j) {
    const float* earlier = widen(s.history[j].at(sample, first), s.history[j].dtype, count, buffers.other);
    const float weight = chunk.edge.h[j];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) mean[i] += weight * earlier[i];
  }
  return mean;
}

// Runs body(sample, first, count) -> sum over all chunks, segments in parallel, and finishes each sample's log-probability.
template <class Body>
void for_chunks(int64_t batch, int64_t size, int threads, const StepArguments* finish, Body body) {
  const int64_t segments = segments_of(size);
  std::vector<double> partial(finish ? batch * segments : 0);
  for_segments(batch, size, threads, [&](int64_t sample, int64_t segment, int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t first = begin; first < end; first += kChunk) sum += body(sample, first, std::min(kChunk, end - first));
    if (finish) partial[sample * segments + segment] = sum;
  });
  if (!finish) return;
  for (int64_t sample = 0; sample < batch; ++sample) {
    double sum = 0;
    for (int64_t j = 0; j < segments; ++j) sum += partial[sample * segments + j];
    finish->log_prob[sample] = step_log_prob(edge_of(*finish, sample), sum, size);
  }
}

// Writes value(i) to x_next and returns the sum of squares of what is stored, after rounding, minus mean(i). Both read their inputs
// before element i is written, which may be an element of theirs: a draw in place. kRounds: x_next may be rounded through a dtype that
// it is not stored in; then mean(i) reads none of them.
template <bool kRounds, class Value, class Mean, class Ahead>
FK_INLINE double store(const StepArguments& s, int64_t sample, int64_t first, int64_t count, Buffers& buffers, Value value, Mean mean,
                       Ahead ahead) {
  char* stored = s.x_next.at(sample, first);
  if (kRounds && s.rounded != DType::float32) {
    uint16_t half[kChunk];
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffers.next[i] = value(i);
    narrow(buffers.next, half, s.rounded, count);
    const float* rounded = widen(half, s.rounded, count, buffers.next);
    std::memcpy(stored, rounded, count * 4);
    return sum_of_squares(count, [=](int64_t i) { return rounded[i] - mean(i); }, kNoPrefetch);
  }
  if (s.x_next.dtype == DType::float32) {
    float* out = reinterpret_cast<float*>(stored);
    const auto residual = [=](int64_t i) __attribute__((always_inline)) {
      const float next = value(i), center = mean(i);
      out[i] = next;
      return next - center;
    };
    return sum_of_squares(count, residual, ahead);
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) buffers.next[i] = value(i);
  narrow(buffers.next, stored, s.x_next.dtype, count);
  const float* rounded = widen(stored, s.x_next.dtype, count, buffers.next);
  return sum_of_squares(count, [=](int64_t i) { return rounded[i] - mean(i); }, kNoPrefetch);
}

// kMore: the mean is kept where it is wanted, and x_next may be rounded first.
template <bool kMore>
void draw_all(const StepArguments& s) {
  for_chunks(s.batch, s.size, s.threads, s.log_prob ? &s : nullptr, [&](int64_t sample, int64_t first, int64_t count) {
    Buffers buffers;
    const Prefetch prefetch{s, sample, first};
    const Chunk chunk = load_chunk(s, edge_of(s, sample), sample, first, count, buffers);
    const StepEdge& edge = chunk.edge;
    if (s.x0.data) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) buffers.other[i] = predicted_x0(edge, chunk.x[i], chunk.velocity[i]);
      narrow(buffers.other, s.x0.at(sample, first), s.x0.dtype, count);
    }
    // By value: through a reference the compiler must assume that writing x_next changes the coefficients.
    const auto draw = [&, edge](auto mean) __attribute__((always_inline)) {
      if (edge.std == 0 || !(s.noise.data || s.key.sample_id))  // neither reads nor makes noise
        return store<kMore>(s, sample, first, count, buffers, mean, mean, prefetch);
      const float* noise = buffers.noise;
      if (s.noise.data) {
        noise = widen(s.noise.at(sample, first), s.noise.dtype, count, buffers.noise);
      } else {
        fill_normals(buffers.noise, first, count, s.key, sample, prefetch);
      }
      const auto value = [edge, mean, noise](int64_t i) { return step_draw(edge, mean(i), noise[i]); };
      return s.noise.data ? store<kMore>(s, sample, first, count, buffers, value, mean, prefetch)
                          : store<kMore>(s, sample, first, count, buffers, value, mean, kNoPrefetch);
    };
    if (!kMore && !s.num_history) return draw([chunk](int64_t i) { return step_mean(chunk.edge, chunk.x[i], chunk.velocity[i]); });
    const float* mean = mean_with_history(s, chunk, sample, first, count, buffers);
    return draw([mean](int64_t i) { return mean[i]; });
  });
}

}  // namespace

void sde_draw(const StepArguments& s) { draw_all<false>(s); }
void sde_draw_mean(const StepArguments& s) { draw_all<true>(s); }

void sde_replay(const StepArguments& s) {
  for_chunks(s.batch, s.size, s.threads, &s, [&](int64_t sample, int64_t first, int64_t count) {
    Buffers buffers;
    const Chunk chunk = load_chunk(s, edge_of(s, sample), sample, first, count, buffers);
    const float* next = widen(s.x_next.at(sample, first), s.x_next.dtype, count, buffers.next);
    const Prefetch prefetch{s, sample, first};
    // By value: through a reference the compiler must assume that keeping the residual changes the coefficients.
    const auto residual = [chunk, next](int64_t i) { return step_residual(next[i], step_mean(chunk.edge, chunk.x[i], chunk.velocity[i])); };
    if (!s.residual.data) return sum_of_squares(count, residual, prefetch);
    float* const kept = reinterpret_cast<float*>(s.residual.at(sample, first));
    return sum_of_squares(count, [=](int64_t i) __attribute__((always_inline)) { return kept[i] = residual(i); }, prefetch);
  });
}

void sde_replay_mean(const StepArguments& s) {
  for_chunks(s.batch, s.size, s.threads, &s, [&](int64_t sample, int64_t first, int64_t count) {
    Buffers buffers;
    const Chunk chunk = load_chunk(s, edge_of(s, sample), sample, first, count, buffers);
    const float* next = widen(s.x_next.at(sample, first), s.x_next.dtype, count, buffers.next);
    float* const mean = reinterpret_cast<float*>(s.mean.at(sample, first));
    const auto residual = [chunk, next, mean](int64_t i) __attribute__((always_inline)) {
      return step_residual(next[i], mean[i] = step_mean(chunk.edge, chunk.x[i], chunk.velocity[i]));
    };
    return sum_of_squares(count, residual, Prefetch{s, sample, first});
  });
}

void sde_replay_backward(const StepArguments& s) {
  for_chunks(s.batch, s.size, s.threads, nullptr, [&](int64_t sample, int64_t first, int64_t count) {
    Buffers buffers;
    const StepEdge edge = edge_of(s, sample);
    const float scale = float(double(s.grad_out[sample * s.grad_stride]) * 2.0 * edge.k * edge.b *
                              (s.velocity_uncond.data ? s.guidance_scale : 1.0f) / double(s.size));
    if (s.residual.data) {
      float* const kept = reinterpret_cast<float*>(s.residual.at(sample, first));
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) kept[i] = step_gradient(scale, kept[i]);
      return 0.0;
    }
    const Chunk chunk = load_chunk(s, edge, sample, first, count, buffers);
    const float* next = widen(s.x_next.at(sample, first), s.x_next.dtype, count, buffers.next);
    const bool direct = s.grad.dtype == DType::float32;
    float* out = direct ? reinterpret_cast<float*>(s.grad.at(sample, first)) : buffers.noise;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float mean = step_mean(edge, chunk.x[i], chunk.velocity[i]);
      out[i] = step_gradient(scale, step_residual(next[i], mean));
    }
    if (!direct) narrow(out, s.grad.at(sample, first), s.grad.dtype, count);
    return 0.0;
  });
}

void sde_mean_backward(const StepArguments& s) {
  for_chunks(s.batch, s.size, s.threads, nullptr, [&](int64_t sample, int64_t first, int64_t count) {
    Buffers buffers;
    const StepEdge edge = edge_of(s, sample);
    const bool direct = s.grad.dtype == DType::float32;
    float* out = direct ? reinterpret_cast<float*>(s.grad.at(sample, first)) : buffers.noise;
    const float by_mean = edge.b * s.guidance_scale;
    const float* grad_mean = s.grad_mean.data ? widen(s.grad_mean.at(sample, first), s.grad_mean.dtype, count, buffers.other) : nullptr;
    if (s.grad_out) {
      const float scale = float(double(s.grad_out[sample * s.grad_stride]) * 2.0 * edge.k * edge.b * s.guidance_scale / double(s.size));
      const float* next = widen(s.x_next.at(sample, first), s.x_next.dtype, count, buffers.next);
      const float* mean = reinterpret_cast<const float*>(s.mean.at(sample, first));
      if (grad_mean) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i)
          out[i] = step_gradient(scale, step_residual(next[i], mean[i])) + mean_gradient(by_mean, grad_mean[i]);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) out[i] = step_gradient(scale, step_residual(next[i], mean[i]));
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) out[i] = mean_gradient(by_mean, grad_mean[i]);
    }
    if (!direct) narrow(out, s.grad.at(sample, first), s.grad.dtype, count);
    return 0.0;
  });
}

void fill_philox(const NormalArguments& n) {
  for_chunks(n.batch, n.size, n.threads, nullptr, [&](int64_t sample, int64_t first, int64_t count) {
    alignas(64) float buffer[kChunk];
    fill_normals(buffer, first, count, n.key, sample, kNoPrefetch);
    std::memcpy(n.out + sample * n.size + first, buffer, count * 4);
    return 0.0;
  });
}

}  // namespace FK_ISA
