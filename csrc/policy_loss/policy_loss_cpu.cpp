// The policy loss on a CPU, forward and backward. Compiled once per instruction set (FK_ISA names the instance).
#include "policy_loss.h"

#include <vector>

#include "../common/chunks_cpu.h"
#include "../common/noise_cpu.h"
#include "../common/siblings_cpu.h"

namespace FK_ISA {
namespace {

FK_INLINE StepEdge edge_of(const PolicyArguments& p, int64_t sample) {
  StepEdge edge;
  std::memcpy(&edge, p.edges + sample * p.edge_stride, sizeof edge);
  return edge;
}

struct Buffers {
  alignas(64) float x[kChunk], velocity[kChunk], old[kChunk], uncond[kChunk], ref[kChunk], next[kChunk], grad[kChunk];
};

// What the samples of a row share, as float32 and guided; a tensor that is not wanted is nullptr.
struct Chunk {
  const float *x, *velocity, *old, *ref;
};

FK_INLINE Chunk load_chunk(const PolicyArguments& p, const Place& at, Buffers& buffers) {
  const float* velocity = load(p.velocity, at.row, at, buffers.velocity);
  if (const float* uncond = load(p.velocity_uncond, at.row, at, buffers.uncond)) {
    const float scale = p.guidance_scale;
#pragma omp simd
    for (int64_t i = 0; i < at.count; ++i) buffers.velocity[i] = guided_velocity(velocity[i], uncond[i], scale);
    velocity = buffers.velocity;
  }
  return {load(p.x_t, at.row, at, buffers.x), velocity, load(p.old_velocity, at.row, at, buffers.old),
          load(p.velocity_ref, at.row, at, buffers.ref)};
}

// x_next of a sample: as given, or drawn again around the old velocity's mean.
__attribute__((noinline)) const float* load_next(const PolicyArguments& p, const StepEdge& edge, const Chunk& chunk, int64_t sample,
                                                 const Place& at, Buffers& buffers) {
  if (p.x_next.data) return load(p.x_next, sample, at, buffers.next);
  float* next = buffers.next;
  const float *x = chunk.x, *old = chunk.old;
  const StepEdge own = edge;
  if (!(own.std > 0)) {
#pragma omp simd
    for (int64_t i = 0; i < at.count; ++i) next[i] = step_mean(own, x[i], old[i]);
    return next;
  }
  const float* noise = next;
  if (p.noise.data) noise = load(p.noise, sample, at, next);
  else fill_normals(next, at.first, at.count, p.key, sample, kNoPrefetch);
#pragma omp simd
  for (int64_t i = 0; i < at.count; ++i) next[i] = step_draw(own, step_mean(own, x[i], old[i]), noise[i]);
  return next;
}

// Asks for the next chunks of one sample's tensors, and of those of its row; either may be none (-1).
struct Prefetch {
  const PolicyArguments& p;
  Place at;
  int64_t row, sample;
  __attribute__((always_inline)) void operator()(int64_t i, int64_t count) const {
    if (row >= 0)
      for (const Latent* latent : {&p.x_t, &p.velocity, &p.old_velocity, &p.velocity_uncond, &p.velocity_ref})
        prefetch_ahead(*latent, row, at.first + i, count);
    if (sample >= 0)
      for (const Latent* latent : {&p.x_next, &p.noise}) prefetch_ahead(*latent, sample, at.first + i, count);
  }
};

// Adds a sample's share of one chunk to its sum, and keeps its residual where that is wanted.
template <Ratio kind>
FK_INLINE void add_ratio_terms(const PolicyArguments& p, const Chunk& chunk, const Prefetch& ahead, Buffers& buffers, double& sum) {
  const StepEdge edge = edge_of(p, ahead.sample);
  const float *x = chunk.x, *velocity = chunk.velocity, *old = chunk.old;
  const float* next = load_next(p, edge, chunk, ahead.sample, ahead.at, buffers);
  const auto term = [=](int64_t i) { return ratio_term<kind>(edge, x[i], velocity[i], kind == Ratio::recorded ? 0.0f : old[i], next[i]); };
  if (!p.residual.data) return lane_sums(ahead.at.count, ahead, {&sum}, term);
  float* const residual = reinterpret_cast<float*>(p.residual.at(ahead.sample, ahead.at.first));
  const float* from = kind == Ratio::guard ? old : velocity;
  lane_sums(ahead.at.count, ahead, {&sum}, [=](int64_t i) {
    residual[i] = ratio_residual(edge, x[i], from[i], next[i]);
    return term(i);
  });
}

// Partial sums by segment; empty where they are not wanted.
double total(const std::vector<double>& partial, int64_t index, int64_t segments) {
  double sum = 0;
  for (int64_t j = 0; j < segments && !partial.empty(); ++j) sum += partial[index * segments + j];
  return sum;
}

// Samples and segments in order, so that no sum depends on the threads.
void finish(const PolicyArguments& p, const std::vector<double>& ratio, const std::vector<double>& kl) {
  const int64_t segments = segments_of(p.size);
  double sum = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const double ratio_sum = total(ratio, b, segments), kl_sum = total(kl, p.row ? p.row[b] : b, segments);
    const PolicySample out =
        policy_sample(p.settings, edge_of(p, b), ratio_sum, kl_sum, p.advantage[b], p.old_log_prob ? p.old_log_prob[b] : 0.0f,
                      p.step_weight ? p.step_weight[b] : 1.0f, p.kl_coef ? p.kl_coef[b] : p.kl_value);
    p.log_ratio[b] = out.log_ratio;
    p.ratio[b] = out.ratio;
    p.kl[b] = out.kl;
    p.clipped_low[b] = out.clipped_low;
    p.clipped_high[b] = out.clipped_high;
    std::memcpy(p.slopes + 2 * b, out.slopes, sizeof out.slopes);
    if (p.reduction == Reduction::none) p.loss[b] = out.loss;
    sum += out.loss;
  }
  if (p.reduction == Reduction::sum) *p.loss = float(sum);
  if (p.reduction == Reduction::mean) *p.loss = float(sum / double(std::max<int64_t>(1, p.batch)));
}

// A chunk of a gradient is a sum of terms; the first is written over whatever memory held.
template <class Term>
FK_INLINE void add_term(float* out, int64_t count, bool is_first, Term term) {
  if (is_first) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = term(i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] += term(i);
  }
}

}  // namespace

void policy_forward(const PolicyArguments& p) {
  const Ratio kind = p.settings.ratio;
  const bool has_ratio = kind != Ratio::on_policy, has_kl = p.velocity_ref.data;
  const int64_t segments = segments_of(p.size);
  std::vector<double> ratio(has_ratio ? p.batch * segments : 0), kl(has_kl ? p.rows * segments : 0);
  const Siblings siblings(p.rows, p.batch, p.row, [](int64_t) { return true; });
  const auto add_chunk = [&](const Place& at, int64_t segment) {
    const int64_t *sample = siblings.begin(at.row), *const end = siblings.end(at.row);
    if (sample == end) return;
    Buffers buffers;
    const Chunk chunk = load_chunk(p, at, buffers);
    if (has_kl) {
      const auto term = [chunk](int64_t i) { return kl_term(chunk.velocity[i], chunk.ref[i]); };
      lane_sums(at.count, Prefetch{p, at, at.row, -1}, {&kl[at.row * segments + segment]}, term);
    }
    for (bool asked_for_row = has_kl; has_ratio && sample != end; ++sample, asked_for_row = true) {
      const Prefetch ahead{p, at, asked_for_row ? -1 : at.row, *sample};
      double& sum = ratio[*sample * segments + segment];
      if (kind == Ratio::sde) add_ratio_terms<Ratio::sde>(p, chunk, ahead, buffers, sum);
      if (kind == Ratio::guard) add_ratio_terms<Ratio::guard>(p, chunk, ahead, buffers, sum);
      if (kind == Ratio::recorded) add_ratio_terms<Ratio::recorded>(p, chunk, ahead, buffers, sum);
    }
  };
  if (has_ratio || has_kl) for_chunks(p.rows, p.size, p.threads, add_chunk);
  finish(p, ratio, kl);
}

void policy_backward(const PolicyArguments& given) {
  PolicyArguments p = given;
  const bool from_old = p.settings.guard && p.old_velocity.data;  // a guarded residual is that of the old mean
  const bool is_kept = p.residual.data;
  if (is_kept) p.grad_velocity = p.residual, p.x_t = p.x_next = p.old_velocity = p.noise = {};
  if ((is_kept || from_old) && !p.velocity_ref.data) p.velocity = p.velocity_uncond = {};
  const auto weight = [&p](int64_t sample, int which) {
    const float slope = p.slopes[2 * sample + which];
    return is_silent(slope) ? 0.0f : p.grad[sample * p.grad_stride] * slope;
  };
  const Siblings siblings(p.rows, p.batch, p.row, [&p](int64_t sample) { return !is_silent(p.slopes[2 * sample]); });
  std::vector<double> kl_weight(p.rows);  // the KL's term is the row's: one weight for all its samples
  if (p.velocity_ref.data)
    for (int64_t b = 0; b < p.batch; ++b) kl_weight[p.row ? p.row[b] : b] += weight(b, 1);

  for_chunks(p.rows, p.size, p.threads, [&](const Place& at, int64_t) {
    char* stored = p.grad_velocity.at(at.row, at.first);
    const float kl_scale = float(kl_weight[at.row]);
    const int64_t *sample = siblings.begin(at.row), *const end = siblings.end(at.row);
    if (sample == end && kl_scale == 0) {
      std::memset(stored, 0, at.count * bytes_of(p.grad_velocity.dtype));
      return;
    }
    Buffers buffers;
    const Chunk chunk = load_chunk(p, at, buffers);
    float* out = p.grad_velocity.dtype == DType::float32 ? reinterpret_cast<float*>(stored) : buffers.grad;
    const float* kept = out;
    if (is_kept && kl_scale != 0) kept = static_cast<const float*>(std::memcpy(buffers.next, out, at.count * 4));
    const float *x = chunk.x, *velocity = chunk.velocity, *ref = chunk.ref, *from = from_old ? chunk.old : velocity;
    bool is_first = true;
    if (kl_scale != 0) {
      add_term(out, at.count, true, [=](int64_t i) { return kl_scale * (velocity[i] - ref[i]); });
      is_first = false;
    }
    for (; sample != end; ++sample, is_first = false) {
      const StepEdge edge = edge_of(p, *sample);
      const float scale = weight(*sample, 0);
      if (is_kept) {
        add_term(out, at.count, is_first, [=](int64_t i) { return scale * kept[i]; });
        continue;
      }
      const float* next = load_next(p, edge, chunk, *sample, at, buffers);
      add_term(out, at.count, is_first, [=](int64_t i) { return scale * ratio_residual(edge, x[i], from[i], next[i]); });
    }
    if (out == buffers.grad) narrow(out, stored, p.grad_velocity.dtype, at.count);
  });
}

}  // namespace FK_ISA
