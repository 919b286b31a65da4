// The token loss on the CPU: a thread takes one token's logits, chunk by chunk, and goes over them twice. The first pass finds what
// they say; where it can, it leaves exp(z - the largest so far) in their place, which the second then only scales.
#include "token_loss.h"

#include <algorithm>
#include <memory>

#include "../common/chunks_cpu.h"

namespace FK_ISA {

namespace {

constexpr float kFarthest = -87.0f;  // below it exp counts as 0

// exp of x <= 0, to 1 ulp or two; a NaN stays one.
FK_INLINE float exp_below(float given) {
  const float x = given < kFarthest ? kFarthest : given;
  const float shifted = x * 1.44269504088896341f + 12582912.0f;  // the nearest integer, in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  p *= bits_to_float((float_to_bits(shifted) << 23) + 0x3F800000u);
  return given < kFarthest ? 0.0f : p;
}

FK_INLINE float tanh_of(float x) {
  const float a = x < 0 ? -x : x, t = exp_below(-2.0f * a), square = x * x;
  const float near = x * (1.0f - square * (1.0f / 3 - square * (2.0f / 15 - square * (17.0f / 315 - square * (62.0f / 2835)))));
  const float far = (1.0f - t) / (1.0f + t);
  return a < 0.25f ? near : x < 0 ? -far : far;
}

// A row's sums: of e = exp(u) and of e u, with u = z - largest.
struct RowSums {
  float largest = -HUGE_VALF;
  double total = 0, moment = 0;
};

// What the second pass needs.
struct Normalizer {
  float largest;
  double log_total;
  float entropy;
};

// One row: its chunks as float32, capped but not yet divided by the temperature.
struct Row {
  const TokenArguments& t;
  int64_t row;
  float scale;  // 1 / temperature

  Row(const TokenArguments& arguments, int64_t index) : t(arguments), row(index), scale(1.0f / arguments.temperature) {}

  char* at(int64_t first) const { return t.logits.at(row, first); }
  float stored(int64_t index) const {
    float value;
    return scaled(*widen(at(index), t.logits.dtype, 1, &value));
  }
  float scaled(float x) const { return (t.cap > 0 ? t.cap * tanh_of(x / t.cap) : x) * scale; }
  const float* capped(int64_t first, int64_t count, float* buffer) const {
    const float* x = widen(at(first), t.logits.dtype, count, buffer);
    if (!(t.cap > 0)) return x;
    const float cap = t.cap;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) buffer[i] = cap * tanh_of(x[i] / cap);
    return buffer;
  }
};

FK_INLINE float largest_of(const float* x, int64_t count) {
  float lanes[kSumLanes];
  for (int l = 0; l < kSumLanes; ++l) lanes[l] = -HUGE_VALF;
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes)
#pragma omp simd
    for (int l = 0; l < kSumLanes; ++l) lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
  for (; i < count; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  for (int l = 1; l < kSumLanes; ++l) lanes[0] = lanes[l] > lanes[0] ? lanes[l] : lanes[0];
  return lanes[0];
}

// Adds a chunk to the sums; `left`, where it is given, gets e.
FK_INLINE void fold(RowSums& sums, const float* x, int64_t count, float scale, float* left) {
  const float largest = std::max(sums.largest, largest_of(x, count) * scale);
  if (largest == -HUGE_VALF) {  // nothing yet that has a probability
    for (int64_t i = 0; left && i < count; ++i) left[i] = 0;
    return;
  }
  if (largest > sums.largest && sums.total > 0) {
    const double fall = double(sums.largest) - largest, keep = std::exp(fall);
    sums.moment = keep * (sums.moment + sums.total * fall), sums.total *= keep;
  }
  sums.largest = largest;
  float totals[kSumLanes] = {}, moments[kSumLanes] = {};
  const auto add = [&](int64_t i, int lane) __attribute__((always_inline)) {
    const float u = x[i] * scale - largest, e = exp_below(u);
    totals[lane] += e, moments[lane] += e * (u < kFarthest ? kFarthest : u);  // 0 times -inf is NaN
    if (left) left[i] = e;
  };
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes)
#pragma omp simd
    for (int l = 0; l < kSumLanes; ++l) add(i + l, l);
  for (; i < count; ++i) add(i, 0);
  sums.total += total_of(totals), sums.moment += total_of(moments);
}

// The first pass. tops: the largest logit that each chunk's e is below, where e is left in the logits' place; else nullptr.
float log_prob_of(const Row& r, float* tops, Normalizer& normalizer, float& target) {
  alignas(64) float buffer[kChunk];
  const int64_t id = r.t.ids[r.row];
  target = r.t.exact ? r.scaled(r.t.exact[r.row]) : r.stored(id);
  RowSums sums;
  for (int64_t first = 0; first < r.t.size; first += kChunk) {
    const int64_t count = std::min(kChunk, r.t.size - first);
    const float* x = r.capped(first, count, buffer);
    if (r.t.exact && id >= first && id < first + count) buffer[id - first] = -HUGE_VALF;  // of 16 bits, so x is the buffer
    fold(sums, x, count, r.scale, tops ? reinterpret_cast<float*>(r.at(first)) : nullptr);
    if (tops) tops[first / kChunk] = sums.largest;
  }
  // In the place of what was left out; taken from the sum afterwards, the rounded one could take all of it along.
  if (r.t.exact) fold(sums, &target, 1, 1, nullptr);
  const double u = double(target) - sums.largest;
  normalizer = {sums.largest, std::log(sums.total), float(std::log(sums.total) - sums.moment / sums.total)};
  return float(u - normalizer.log_total);
}

// The gradient in the place of the logits, of slope lp - entropy_slope entropy.
FK_INLINE float slope_at(const Row& r, float z, const Normalizer& n, float slope, float entropy_slope, bool is_target) {
  const float u = float(double(z) - n.largest - n.log_total), p = exp_below(u);
  const float dz = p * (entropy_slope * ((u < kFarthest ? kFarthest : u) + n.entropy) - slope) + (is_target ? slope : 0.0f);
  const float t = r.t.cap > 0 ? z / (r.scale * r.t.cap) : 0.0f;
  return dz * r.scale * (1.0f - t * t);
}

void overwrite(const Row& r, const Normalizer& n, float target, float slope, float entropy_slope) {
  alignas(64) float buffer[kChunk], made[kChunk];
  const float largest = n.largest, log_total = float(n.log_total), scale = r.scale, entropy = n.entropy, cap = r.t.cap;
  const bool direct = r.t.logits.dtype == DType::float32;
  for (int64_t first = 0; first < r.t.size; first += kChunk) {
    const int64_t count = std::min(kChunk, r.t.size - first);
    const float* x = r.capped(first, count, buffer);
    float* out = direct ? reinterpret_cast<float*>(r.at(first)) : made;
    const auto gradient = [&](auto has_entropy, auto is_capped) __attribute__((always_inline)) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const float u = (x[i] * scale - largest) - log_total, p = exp_below(u);
        float dz = has_entropy ? p * (entropy_slope * ((u < kFarthest ? kFarthest : u) + entropy) - slope) : p * -slope;
        if (is_capped) dz *= 1.0f - (x[i] / cap) * (x[i] / cap);
        out[i] = dz * scale;
      }
    };
    if (cap > 0) gradient(std::true_type{}, std::true_type{});
    else if (entropy_slope != 0) gradient(std::true_type{}, std::false_type{});
    else gradient(std::false_type{}, std::false_type{});
    if (!direct) narrow(made, r.at(first), r.t.logits.dtype, count);
  }
  const float at_target = slope_at(r, target, n, slope, entropy_slope, true);
  narrow(&at_target, r.at(r.t.ids[r.row]), r.t.logits.dtype, 1);
}

// The same where e is in the place of the logits, in float32, without softcap and entropy slope.
void rescale(const Row& r, const float* tops, const Normalizer& n, float target, float slope) {
  float* out = reinterpret_cast<float*>(r.at(0));
  for (int64_t first = 0; first < r.t.size; first += kChunk) {
    const int64_t count = std::min(kChunk, r.t.size - first);
    const float factor = float(-double(slope) * r.scale * std::exp(double(tops[first / kChunk]) - n.largest - n.log_total));
#pragma omp simd
    for (int64_t i = first; i < first + count; ++i) out[i] *= factor;
  }
  out[r.t.ids[r.row]] = slope_at(r, target, n, slope, 0, true);
}

// Runs body(row, tops) over all tokens, in parallel; tops: a float for each chunk of a row.
template <class Body>
void for_tokens(const TokenArguments& t, Body body) {
  const int team = int(std::max<int64_t>(1, std::min({int64_t(t.threads), t.rows, t.rows * t.size / kPerThread})));
#pragma omp parallel num_threads(team) if (team > 1)
  {
    const std::unique_ptr<float[]> tops(new float[(t.size + kChunk - 1) / kChunk]);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < t.rows; ++row) body(Row(t, row), tops.get());
  }
}

}  // namespace

void token_policy(const TokenArguments& t) {
  const bool leaves = t.wants_gradient && t.logits.dtype == DType::float32 && !(t.cap > 0) && t.objective.entropy_coef == 0;
  for_tokens(t, [&](const Row& r, float* tops) {
    const int64_t m = r.row;
    const auto of = [m](const float* x) { return x ? x + m : nullptr; };
    Normalizer n;
    float target;
    t.log_prob[m] = log_prob_of(r, leaves ? tops : nullptr, n, target);
    const Token token{t.advantage[m], t.weight[m], of(t.old), of(t.ref), of(t.sample)};
    const TokenTerm term = token_term(t.objective, token, t.log_prob[m], n.entropy);
    t.ratio[m] = float(term.ratio), t.kl[m] = float(term.kl), t.entropy[m] = n.entropy, t.loss[m] = float(term.loss);
    t.clipped[m] = term.is_clipped;
    if (leaves) rescale(r, tops, n, target, float(term.slope));
    else if (t.wants_gradient) overwrite(r, n, target, float(term.slope), float(term.entropy_slope));
  });
}

void token_log_prob(const TokenArguments& t) {
  for_tokens(t, [&](const Row& r, float*) {
    Normalizer n;
    float target;
    t.log_prob[r.row] = log_prob_of(r, nullptr, n, target);
    t.largest[r.row] = n.largest, t.log_total[r.row] = float(n.log_total);
  });
}

void token_gradient(const TokenArguments& t) {
  for_tokens(t, [&](const Row& r, float*) {
    const float target = t.exact ? r.scaled(t.exact[r.row]) : r.stored(t.ids[r.row]);
    overwrite(r, {t.largest[r.row], t.log_total[r.row], 0}, target, t.grad[r.row], 0);
  });
}

}  // namespace FK_ISA
