// The matching losses on a CPU: sums and slopes, the gradient, the noising of x0. Compiled once per instruction set.
#include "matching_loss.h"

#include <vector>

#include "../common/chunks_cpu.h"
#include "../common/noise_cpu.h"
#include "../common/siblings_cpu.h"

namespace FK_ISA {
namespace {

struct Buffers {
  alignas(64) float velocity[kChunk], old[kChunk], anchor[kChunk], x0[kChunk], noise[kChunk], grad[kChunk];
};

// float32 is read in place, so the pass that reads it asks ahead for it; a narrower latent asks while it is widened.
FK_INLINE Latent read_in_place(const Latent& latent) { return latent.dtype == DType::float32 ? latent : Latent{}; }

// Asks for what the next chunks of some latents of one row, or one sample, will read.
template <class... Latents>
auto prefetch_of(int64_t index, int64_t first, const Latents&... latents) {
  return [=](int64_t i, int64_t count)
             __attribute__((always_inline)) { (prefetch_ahead(read_in_place(latents), index, first + i, count), ...); };
}

template <class Ahead>
FK_INLINE const float* load_noise(const Latent& noise, const NoiseKey& key, int64_t sample, const Place& at, float* buffer, Ahead ahead) {
  if (noise.data) return load(noise, sample, at, buffer);
  fill_normals(buffer, at.first, at.count, key, sample, ahead);
  return buffer;
}

// The sums of one sample over one chunk, added to s; keep(i, value) is given each residual.
template <class Ahead, class Keep>
FK_INLINE void add_sums(bool nft, const float* v, const float* old, const float* x0, const float* noise, int64_t count, MatchingSums& s,
                        Ahead ahead, Keep keep) {
  const auto u = [=](int64_t i) { return target_velocity(noise[i], x0[i]); };
  const auto square = [=](int64_t i) {
    keep(i, v[i] - u(i));
    return squared_difference(v[i], u(i));
  };
  const auto size = [=](int64_t i) { return std::fabs(v[i] - u(i)); };
  if (nft && old) {
    const auto minus_square = [=](int64_t i) { return squared_difference(reflected(v[i], old[i]), u(i)); };
    const auto minus_size = [=](int64_t i) { return std::fabs(reflected(v[i], old[i]) - u(i)); };
    lane_sums(count, ahead, {&s.squares, &s.sizes, &s.old_squares, &s.old_sizes}, square, size, minus_square, minus_size);
  } else if (nft) {
    lane_sums(count, ahead, {&s.squares, &s.sizes}, square, size);
  } else if (old) {
    const auto old_square = [=](int64_t i) { return squared_difference(old[i], u(i)); };
    const auto drift = [=](int64_t i) { return matching_drift(v[i], old[i], u(i)); };
    lane_sums(count, ahead, {&s.squares, &s.old_squares, &s.drift}, square, old_square, drift);
  } else {
    lane_sums(count, ahead, {&s.squares}, square);
  }
}

struct AnchorSums {
  double ref, ema;
};

// The sums of the row's distance to its anchors over one chunk.
FK_INLINE void add_anchor_sums(const MatchingArguments& m, const Place& at, const float* v, Buffers& buffers, AnchorSums& sums) {
  const auto add = [&](const Latent& latent, double& sum) __attribute__((always_inline)) {
    if (!latent.data) return;
    const float* anchor = load(latent, at.row, at, buffers.anchor);
    const auto square = [=](int64_t i) { return squared_difference(v[i], anchor[i]); };
    lane_sums(at.count, prefetch_of(at.row, at.first, latent), {&sum}, square);
  };
  add(m.ref, sums.ref);
  add(m.ema, sums.ema);
}

// The chunk of a velocity where nft_beta puts it, in a buffer that may hold it already. Apart from the loops of those who do not ask.
__attribute__((noinline)) const float* mixed_chunk(const MatchingArguments& m, const float* v, const float* old, int64_t count,
                                                   float* buffer) {
  const float mix = m.rule.mix;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) buffer[i] = mixed(v[i], old[i], mix);
  return buffer;
}

// Segments in order, so that no sum depends on the threads.
void finish(const MatchingArguments& m, const std::vector<MatchingSums>& partial, const std::vector<AnchorSums>& anchors) {
  const int64_t segments = segments_of(m.rule.size);
  double loss = 0;
  for (int64_t b = 0; b < m.batch; ++b) {
    MatchingSums sums{};
    const int64_t row = m.row ? m.row[b] : b;
    for (int64_t j = 0; j < segments; ++j) {
      const MatchingSums& part = partial[b * segments + j];
      sums.squares += part.squares;
      sums.old_squares += part.old_squares;
      sums.drift += part.drift;
      sums.sizes += part.sizes;
      sums.old_sizes += part.old_sizes;
      sums.ref += anchors[row * segments + j].ref;
      sums.ema += anchors[row * segments + j].ema;
    }
    MatchingResult result = matching_result(m, b, sums);
    add_anchors(m, b, sums, result);
    if (!m.is_reduced) m.loss[b] = float(result.loss);
    loss += result.loss;
    m.log_ratio[b] = result.log_ratio;
    m.ratio[b] = result.ratio;
    m.matching[b] = result.matching;
    m.ref_mean[b] = result.ref;
    m.ema_mean[b] = result.ema;
    m.clipped_low[b] = result.clipped_low;
    m.clipped_high[b] = result.clipped_high;
    std::memcpy(m.slopes + 4 * b, result.slopes, sizeof result.slopes);
  }
  if (m.is_reduced) *m.loss = float(loss * m.rule.share);
}

// out[i] = value(i); ahead(i, n) is called before elements i .. i + n - 1.
template <class Value, class Ahead>
FK_INLINE void write(float* out, int64_t count, Value value, Ahead ahead) {
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    ahead(i, kSumLanes);
#pragma omp simd
    for (int64_t j = i; j < i + kSumLanes; ++j) out[j] = value(j);
  }
  for (; i < count; ++i) out[i] = value(i);
}

// A chunk of a gradient, summed term by term: the first is written, and with it what the whole row needs is asked for ahead;
// others are added.
template <class RowAhead>
struct Gradient {
  float* out;
  int64_t count;
  RowAhead row_ahead;
  bool is_written;

  template <class Term, class Ahead>
  __attribute__((always_inline)) void add(Term term, Ahead ahead) {
    float* const to = out;
    const auto row = row_ahead;
    if (is_written) write(to, count, [=](int64_t i) { return to[i] + term(i); }, ahead);
    else write(to, count, term, [=](int64_t i, int64_t n) __attribute__((always_inline)) { row(i, n), ahead(i, n); });
    is_written = true;
  }
};

}  // namespace

void matching_forward(const MatchingArguments& m) {
  const int64_t segments = segments_of(m.rule.size);
  std::vector<MatchingSums> partial(m.batch * segments);
  std::vector<AnchorSums> anchors(m.rows * segments);
  const Siblings siblings(m.rows, m.batch, m.row, [](int64_t) { return true; });
  for_chunks(m.rows, m.rule.size, m.threads, [&](const Place& at, int64_t segment) {
    const int64_t *sample = siblings.begin(at.row), *const end = siblings.end(at.row);
    if (sample == end) return;
    Buffers buffers;
    const float* v = load(m.velocity, at.row, at, buffers.velocity);
    const float* old = load(m.old_velocity, at.row, at, buffers.old);
    add_anchor_sums(m, at, v, buffers, anchors[at.row * segments + segment]);
    if (m.rule.mix != 1) v = mixed_chunk(m, v, old, at.count, buffers.velocity);
    for (bool is_first = true; sample != end; ++sample, is_first = false) {
      const auto sample_ahead = prefetch_of(*sample, at.first, m.x0, m.noise);
      const auto row_ahead = prefetch_of(at.row, at.first, m.velocity, m.old_velocity);
      const auto ahead = [=](int64_t i, int64_t count) __attribute__((always_inline)) {
        sample_ahead(i, count);
        if (is_first) row_ahead(i, count);
      };
      const float* x0 = load(m.x0, *sample, at, buffers.x0);
      const float* noise = load_noise(m.noise, m.key, *sample, at, buffers.noise, ahead);
      MatchingSums& sums = partial[*sample * segments + segment];
      if (!m.residual.data) {
        add_sums(m.rule.nft, v, old, x0, noise, at.count, sums, ahead, [](int64_t, float) {});
        continue;
      }
      float* const residual = reinterpret_cast<float*>(m.residual.at(at.row, at.first));
      add_sums(m.rule.nft, v, old, x0, noise, at.count, sums, ahead, [=](int64_t i, float value) { residual[i] = value; });
    }
  });
  finish(m, partial, anchors);
}

void matching_backward(const MatchingArguments& given) {
  MatchingArguments m = given;
  const bool is_kept = m.residual.data;
  if (is_kept) m.grad_velocity = m.residual, m.x0 = m.noise = m.old_velocity = {};
  // A slope of 0 stays 0 whatever comes in, and what only it needs is not read.
  const bool is_there[4] = {true, m.old_velocity.data != nullptr, m.ref.data != nullptr, m.ema.data != nullptr};
  const auto weight = [&m, &is_there](int64_t sample, int which) {
    const float slope = is_there[which] ? m.slopes[4 * sample + which] : 0.0f;
    return slope == 0 ? 0.0f : m.grad[sample * m.grad_stride] * slope;
  };
  const Siblings siblings(m.rows, m.batch, m.row, [=](int64_t b) { return weight(b, 0) != 0 || weight(b, 1) != 0; });
  std::vector<float> ref_weight(m.rows), ema_weight(m.rows);  // anchors are the row's: one weight for all of its samples
  for (int64_t b = 0; b < m.batch; ++b) {
    ref_weight[m.row ? m.row[b] : b] += weight(b, 2);
    ema_weight[m.row ? m.row[b] : b] += weight(b, 3);
  }
  for_chunks(m.rows, m.rule.size, m.threads, [&](const Place& at, int64_t) {
    char* stored = m.grad_velocity.at(at.row, at.first);
    const int64_t *sample = siblings.begin(at.row), *const end = siblings.end(at.row);
    if (sample == end && ref_weight[at.row] == 0 && ema_weight[at.row] == 0) {
      std::memset(stored, 0, at.count * bytes_of(m.grad_velocity.dtype));
      return;
    }
    Buffers buffers;
    const float* v = load(m.velocity, at.row, at, buffers.velocity);
    float* out = m.grad_velocity.dtype == DType::float32 ? reinterpret_cast<float*>(stored) : buffers.grad;
    const bool has_anchors = ref_weight[at.row] != 0 || ema_weight[at.row] != 0;
    const float* kept = out;
    if (is_kept && has_anchors) kept = static_cast<const float*>(std::memcpy(buffers.x0, out, at.count * 4));
    const auto row_ahead = prefetch_of(at.row, at.first, m.velocity, m.grad_velocity);
    Gradient<decltype(row_ahead)> gradient{out, at.count, row_ahead, false};
    const auto pull = [&](const Latent& latent, float scale) __attribute__((always_inline)) {
      if (scale == 0) return;
      const float* anchor = load(latent, at.row, at, buffers.anchor);
      gradient.add([=](int64_t i) { return scale * (v[i] - anchor[i]); }, prefetch_of(at.row, at.first, latent));
    };
    pull(m.ref, ref_weight[at.row]);
    pull(m.ema, ema_weight[at.row]);
    if (m.rule.mix != 1 && sample != end) v = mixed_chunk(m, v, load(m.old_velocity, at.row, at, buffers.old), at.count, buffers.velocity);
    for (; sample != end; ++sample) {
      const float plus = weight(*sample, 0), minus = weight(*sample, 1);
      if (is_kept) {
        gradient.add([=](int64_t i) { return plus * kept[i]; }, kNoPrefetch);
        continue;
      }
      const float* x0 = load(m.x0, *sample, at, buffers.x0);
      const auto ahead = prefetch_of(*sample, at.first, m.x0, m.noise);
      const float* noise = load_noise(m.noise, m.key, *sample, at, buffers.noise, ahead);
      const auto u = [=](int64_t i) { return target_velocity(noise[i], x0[i]); };
      if (minus == 0) {
        gradient.add([=](int64_t i) { return plus * (v[i] - u(i)); }, ahead);
      } else {
        const float* old = load(m.old_velocity, at.row, at, buffers.old);
        const auto old_ahead = prefetch_of(at.row, at.first, m.old_velocity);
        const auto term = [=](int64_t i) { return plus * (v[i] - u(i)) + minus * (reflected(v[i], old[i]) - u(i)); };
        gradient.add(term, [=](int64_t i, int64_t n) __attribute__((always_inline)) { ahead(i, n), old_ahead(i, n); });
      }
    }
    if (out == buffers.grad) narrow(out, stored, m.grad_velocity.dtype, at.count);
  });
}

void add_noise(const NoisingArguments& n) {
  for_segments(n.batch, n.size, n.threads, [&](int64_t sample, int64_t, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kChunk) {
      const Place at{sample, first, std::min(kChunk, end - first)};
      Buffers buffers;
      const float* x0 = load(n.x0, sample, at, buffers.x0);
      const float* noise = load_noise(n.noise, n.key, sample, at, buffers.noise, prefetch_of(sample, first, n.x0));
      const float sigma = n.sigma[sample];
      char* stored = n.out.at(sample, first);
      float* out = n.out.dtype == DType::float32 ? reinterpret_cast<float*>(stored) : buffers.grad;
#pragma omp simd
      for (int64_t i = 0; i < at.count; ++i) out[i] = noised(sigma, x0[i], noise[i]);
      if (out == buffers.grad) narrow(out, stored, n.out.dtype, at.count);
    }
  });
}

}  // namespace FK_ISA
