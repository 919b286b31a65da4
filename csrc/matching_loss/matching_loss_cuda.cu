// The matching losses on CUDA: sums and slopes, the gradient, the noising of x0; one launch each. A block takes one tile of one velocity
// row (of one sample, to noise it), a thread eight elements.
#include "matching_loss.h"

#include "../common/latent_cuda.cuh"
#include "../common/siblings_cuda.cuh"

namespace {

// What a launch adds to the arguments.
struct MatchingLaunch {
  MatchingArguments m;
  Walk walk;
  LossScratch scratch;  // forward only
  bool vectors;         // whether latents allow 128-bit accesses
};
struct NoisingLaunch {
  NoisingArguments n;
  Divisor tiles;  // of a sample
  bool vectors;
};

// kKept: with a residual, which only samples with rows of their own have.
template <Calls kCalls, bool kKept>
FK_DEVICE MatchingLaunch known(MatchingLaunch launch) {
  MatchingArguments& m = launch.m;
  know_dtypes<kCalls>(m.velocity, m.old_velocity, m.ref, m.ema, m.x0, m.noise, m.residual, m.grad_velocity);
  if constexpr (kCalls != Calls::any || kKept) know_own_rows(launch.walk);
  return launch;
}

template <Calls kCalls>
FK_DEVICE NoisingLaunch known(NoisingLaunch launch) {
  know_dtypes<kCalls>(launch.n.x0, launch.n.noise, launch.n.out);
  return launch;
}

// What a sample has of its own.
struct SampleGroups {
  Group x0, noise;
};

FK_DEVICE SampleGroups load_sample(const Latent& x0, const Latent& noise, const Place& at, bool is_whole) {
  return {load_group(x0, at, is_whole), load_group(noise, at, is_whole)};
}

// kDrawn: from the key, else as given.
template <bool kDrawn>
FK_DEVICE Floats noise_of(const Latent& noise, const NoiseKey& key, const SampleGroups& groups, const Place& at) {
  if constexpr (kDrawn) return normals(key, at.sample, at.first);
  else return widen(groups.noise, noise.dtype);
}

template <bool kDrawn>
FK_DEVICE Floats target_of(const MatchingArguments& m, const SampleGroups& groups, const Place& at) {
  Floats target = noise_of<kDrawn>(m.noise, m.key, groups, at);
  const Floats x0 = widen(groups.x0, m.x0.dtype);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) target.v[i] = target_velocity(target.v[i], x0.v[i]);
  return target;
}

constexpr int kMatchingSums = 6;  // per sample

// squares; old_squares; awm: drift, nft: sizes; old_sizes; ref; ema. Those that the loss needs:
FK_DEVICE unsigned used_sums(const MatchingArguments& m) {
  unsigned used = 1u | (m.ref.data ? 16u : 0u) | (m.ema.data ? 32u : 0u);
  if (m.rule.has_old) used |= 2u | (m.rule.nft ? 8u : 4u);
  return used | (m.rule.nft ? 4u : 0u);
}

FK_DEVICE void add_terms(const MatchingRule& rule, float v, float old, float u, float (&sums)[kMatchingSums]) {
  if (rule.nft) v = mixed(v, old, rule.mix);
  sums[0] += squared_difference(v, u);
  if (rule.nft) {
    sums[2] += fabsf(v - u);
    if (!rule.has_old) return;
    const float minus = reflected(v, old);
    sums[1] += squared_difference(minus, u);
    sums[3] += fabsf(minus - u);
  } else if (rule.has_old) {
    sums[1] += squared_difference(old, u);
    sums[2] += matching_drift(v, old, u);
  }
}

FK_DEVICE float distance(const Floats& velocity, const Latent& latent, const Group& group, int count) {
  if (!latent.data) return 0.0f;
  const Floats anchor = widen(group, latent.dtype);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < count) sum += squared_difference(velocity.v[i], anchor.v[i]);
  return sum;
}

// The whole warp: a sample's loss, statistics and slopes; the last sample of all also writes the loss of the batch.
FK_DEVICE void finish_sample(const MatchingLaunch& launch, int64_t sample, const double (&totals)[kMatchingSums]) {
  const MatchingArguments& m = launch.m;
  if (lane_index() == 0) {
    MatchingSums sums = {};
    sums.squares = totals[0];
    sums.old_squares = totals[1];
    (m.rule.nft ? sums.sizes : sums.drift) = totals[2];
    sums.old_sizes = totals[3];
    sums.ref = totals[4];
    sums.ema = totals[5];
    MatchingResult out = matching_result(m, sample, sums);
    m.log_ratio[sample] = out.log_ratio;
    m.ratio[sample] = out.ratio;
    m.matching[sample] = out.matching;
    m.clipped_low[sample] = out.clipped_low;
    m.clipped_high[sample] = out.clipped_high;
    add_anchors(m, sample, sums, out);  // after what is stored, so that coefficients are not held in registers meanwhile
    m.ref_mean[sample] = out.ref;
    m.ema_mean[sample] = out.ema;
#pragma unroll
    for (int k = 0; k < 4; ++k) m.slopes[4 * sample + k] = out.slopes[k];
    launch.scratch.sample_loss[sample] = is_out_of_range(launch.walk, sample) ? NAN : float(out.loss);
  }
  if (m.is_reduced) reduce_loss(launch.scratch, sample, m.batch, m.rule.share, m.loss);
}

// What the samples of a row share.
struct RowGroups {
  Group velocity, old, ref, ema;
};

FK_DEVICE RowGroups load_row(const MatchingArguments& m, const Place& at, bool is_whole) {
  return {load_group(m.velocity, at, is_whole), load_group(m.old_velocity, at, is_whole), load_group(m.ref, at, is_whole),
          load_group(m.ema, at, is_whole)};
}

FK_DEVICE Floats residual_of(const Floats& velocity, const Floats& target) {
  Floats residual;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) residual.v[i] = velocity.v[i] - target.v[i];
  return residual;
}

template <bool kDrawn, bool kKept>
FK_DEVICE void add_terms(const MatchingArguments& m, const RowGroups& row, const SampleGroups& groups, const Place& at, bool is_whole,
                         float (&sums)[kMatchingSums]) {
  const Floats target = target_of<kDrawn>(m, groups, at);
  const Floats v = widen(row.velocity, m.velocity.dtype), old = widen(row.old, m.old_velocity.dtype);
  if constexpr (kKept) store_group(m.residual, at, is_whole, residual_of(v, target));
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < at.count) add_terms(m.rule, v.v[i], old.v[i], target.v[i], sums);
}

FK_DEVICE void add_distances(const MatchingArguments& m, const RowGroups& row, int count, float (&sums)[kMatchingSums]) {
  sums[4] = distance(widen(row.velocity, m.velocity.dtype), m.ref, row.ref, count);
  sums[5] = distance(widen(row.velocity, m.velocity.dtype), m.ema, row.ema, count);
}

// The sums of a sample that has its row alone: all loads in flight before the first is used.
template <bool kDrawn, bool kKept>
FK_DEVICE void add_alone(const MatchingArguments& m, const Place& at, bool is_whole, float (&sums)[kMatchingSums]) {
  const RowGroups row = load_row(m, at, is_whole);
  const SampleGroups groups = load_sample(m.x0, m.noise, at, is_whole);
  add_terms<kDrawn, kKept>(m, row, groups, at, is_whole, sums);
  add_distances(m, row, at.count, sums);
}

// kDrawn: noise is made, not given. The registers that takes would cost the other half its threads. kKept: the residual is stored.
template <Calls kCalls, bool kDrawn, bool kKept>
__global__ void __launch_bounds__(256, kCalls == Calls::any && !kKept ? 2 : 3)
    matching_forward_kernel(const __grid_constant__ MatchingLaunch given) {
  const MatchingLaunch launch = known<kCalls, kKept>(given);
  const MatchingArguments& m = launch.m;
  const RowTile tile = row_tile_of_block(launch.walk);
  const Place at = place_of_thread(tile.row, tile.tile, m.rule.size);
  const bool is_whole = launch.vectors && at.count == kGroup;
  const auto finish = [&](int64_t sample, const double (&totals)[kMatchingSums]) { finish_sample(launch, sample, totals); };
  if constexpr (kCalls != Calls::any || kKept) {
    float sums[kMatchingSums] = {};
    if (is_whole) add_alone<kDrawn, kKept>(m, at, true, sums);
    else if (at.count > 0) add_alone<kDrawn, kKept>(m, at, false, sums);
    sum_alone(tile, launch.walk, launch.scratch.tiles, used_sums(m), sums, finish);
  } else {
    const auto place_of = [&](int64_t sample) { return Place{sample, at.first, at.count}; };
    const auto fetch = [&](int64_t sample) { return load_sample(m.x0, m.noise, place_of(sample), is_whole); };
    const RowGroups row = load_row(m, at, is_whole);
    const SampleGroups only = launch.walk.row ? SampleGroups{} : fetch(tile.row);
    float of_row[kMatchingSums] = {};
    add_distances(m, row, at.count, of_row);
    const auto term = [&](int64_t sample, const SampleGroups& groups, float (&sums)[kMatchingSums]) {
      add_terms<kDrawn, false>(m, row, groups, place_of(sample), is_whole, sums);
      sums[4] = of_row[4];
      sums[5] = of_row[5];
    };
    sum_siblings<kMatchingSums>(launch.walk, tile, launch.scratch.tiles, used_sums(m), only, fetch, term, finish);
  }
}

// A slope of 0 stays 0 whatever comes in, and what only it needs is not read.
FK_DEVICE float weight(const MatchingArguments& m, int64_t sample, int which, bool is_there) {
  const float slope = is_there ? m.slopes[4 * sample + which] : 0.0f;
  return slope == 0 ? 0.0f : m.grad[sample * m.grad_stride] * slope;
}

// The whole warp: adds up what lanes have, in order.
FK_DEVICE void add_in_order(float& sum, float value) {
  for (unsigned left = __ballot_sync(kAllLanes, value != 0); left; left &= left - 1) sum += __shfl_sync(kAllLanes, value, __ffs(left) - 1);
}

template <Calls kCalls, bool kDrawn>
__global__ void __launch_bounds__(256) matching_backward_kernel(const __grid_constant__ MatchingLaunch given) {
  const MatchingLaunch launch = known<kCalls, false>(given);
  const MatchingArguments& m = launch.m;
  const RowTile tile = row_tile_of_block(launch.walk);
  const Place at = place_of_thread(tile.row, tile.tile, m.rule.size);
  const bool is_whole = launch.vectors && at.count == kGroup;
  Group velocity = {}, old_velocity = {};
  Floats gradient = {};
  bool has_velocity = false, has_old = false;
  float ref_weight = 0, ema_weight = 0;
  const auto need_velocity = [&] {
    if (!has_velocity) velocity = load_group(m.velocity, at, is_whole);
    has_velocity = true;
  };
  const Places places = places_of(launch.walk, tile);
  for (int64_t base = places.begin; base < places.end; base += kWarp) {
    const bool member = is_member(launch.walk, tile.row, base + lane_index(), places);
    const int64_t mine = member ? sample_at(launch.walk, base + lane_index()) : 0;
    const float plus = weight(m, mine, 0, member), minus = weight(m, mine, 1, member && m.old_velocity.data);
    add_in_order(ref_weight, weight(m, mine, 2, member && m.ref.data));
    add_in_order(ema_weight, weight(m, mine, 3, member && m.ema.data));
    for (unsigned left = __ballot_sync(kAllLanes, plus != 0 || minus != 0); left; left &= left - 1) {
      const int lane = __ffs(left) - 1;
      const float to_target = __shfl_sync(kAllLanes, plus, lane), from_reflected = __shfl_sync(kAllLanes, minus, lane);
      need_velocity();
      if ((from_reflected != 0 || m.rule.mix != 1) && !has_old) {
        old_velocity = load_group(m.old_velocity, at, is_whole);
        has_old = true;
      }
      const Place there = {__shfl_sync(kAllLanes, mine, lane), at.first, at.count};
      const SampleGroups groups = load_sample(m.x0, m.noise, there, is_whole);
      const Floats u = target_of<kDrawn>(m, groups, there), v = widen(velocity, m.velocity.dtype);
      const Floats old = widen(old_velocity, m.old_velocity.dtype);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float towards = mixed(v.v[i], old.v[i], m.rule.mix);
        gradient.v[i] += to_target * (towards - u.v[i]);
        if (from_reflected != 0) gradient.v[i] += from_reflected * (reflected(towards, old.v[i]) - u.v[i]);
      }
    }
  }
  const auto pull = [&](const Latent& latent, float scale) {
    if (scale == 0) return;
    need_velocity();
    const Floats anchor = widen(load_group(latent, at, is_whole), latent.dtype), v = widen(velocity, m.velocity.dtype);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) gradient.v[i] += scale * (v.v[i] - anchor.v[i]);
  };
  pull(m.ref, ref_weight);
  pull(m.ema, ema_weight);
  store_group(m.grad_velocity, at, is_whole, gradient);
}

// The same from the residual that forward has kept of samples with rows of their own, in whose memory the gradient is left.
template <Calls kCalls>
__global__ void __launch_bounds__(256) matching_backward_kept_kernel(const __grid_constant__ MatchingLaunch given) {
  const MatchingLaunch launch = known<kCalls, true>(given);
  const MatchingArguments& m = launch.m;
  const RowTile tile = row_tile_of_block(launch.walk, true);
  const Place at = place_of_thread(tile.row, tile.tile, m.rule.size);
  const bool is_whole = launch.vectors && at.count == kGroup;
  const float scale = weight(m, at.sample, 0, true), ref_weight = weight(m, at.sample, 2, m.ref.data);
  const float ema_weight = weight(m, at.sample, 3, m.ema.data);
  const Floats residual = widen(scale != 0 ? load_group(m.residual, at, is_whole) : Group{}, DType::float32);
  Floats gradient = {};
#pragma unroll
  for (int i = 0; i < kGroup; ++i) gradient.v[i] += scale * residual.v[i];
  if (ref_weight != 0 || ema_weight != 0) {
    const Floats v = widen(load_group(m.velocity, at, is_whole), m.velocity.dtype);
    const auto pull = [&](const Latent& latent, float weight) {
      if (weight == 0) return;
      const Floats anchor = widen(load_group(latent, at, is_whole), latent.dtype);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) gradient.v[i] += weight * (v.v[i] - anchor.v[i]);
    };
    pull(m.ref, ref_weight);
    pull(m.ema, ema_weight);
  }
  store_group(m.residual, at, is_whole, gradient);
}

template <Calls kCalls, bool kDrawn>
__global__ void __launch_bounds__(256) add_noise_kernel(const __grid_constant__ NoisingLaunch given) {
  const NoisingLaunch launch = known<kCalls>(given);
  const NoisingArguments& n = launch.n;
  const unsigned sample = quotient(blockIdx.x, launch.tiles), tile = blockIdx.x - sample * launch.tiles.by;
  const Place at = place_of_thread(sample, tile, n.size);
  if (at.count == 0) return;
  const bool is_whole = launch.vectors && at.count == kGroup;
  const SampleGroups groups = load_sample(n.x0, n.noise, at, is_whole);
  const Floats noise = noise_of<kDrawn>(n.noise, n.key, groups, at), x0 = widen(groups.x0, n.x0.dtype);
  const float sigma = n.sigma[sample];
  Floats out;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) out.v[i] = noised(sigma, x0.v[i], noise.v[i]);
  store_group(n.out, at, is_whole, out);
}

template <bool kDrawn>
constexpr Kernels<MatchingLaunch> kForward = {{matching_forward_kernel<Calls::any, kDrawn, false>,
                                               matching_forward_kernel<Calls::plain_float32, kDrawn, false>,
                                               matching_forward_kernel<Calls::plain_bfloat16, kDrawn, false>}};
// A residual is float32: there are two of these.
template <bool kDrawn>
constexpr Kernels<MatchingLaunch> kForwardKept = {{matching_forward_kernel<Calls::any, kDrawn, true>,
                                                   matching_forward_kernel<Calls::plain_float32, kDrawn, true>,
                                                   matching_forward_kernel<Calls::any, kDrawn, true>}};
constexpr Kernels<MatchingLaunch> kBackwardKept = {{matching_backward_kept_kernel<Calls::any>,
                                                    matching_backward_kept_kernel<Calls::plain_float32>,
                                                    matching_backward_kept_kernel<Calls::any>}};
template <bool kDrawn>
constexpr Kernels<MatchingLaunch> kBackward = {{matching_backward_kernel<Calls::any, kDrawn>,
                                                matching_backward_kernel<Calls::plain_float32, kDrawn>,
                                                matching_backward_kernel<Calls::plain_bfloat16, kDrawn>}};
template <bool kDrawn>
constexpr Kernels<NoisingLaunch> kAddNoise = {{add_noise_kernel<Calls::any, kDrawn>, add_noise_kernel<Calls::plain_float32, kDrawn>,
                                               add_noise_kernel<Calls::plain_bfloat16, kDrawn>}};

auto pick(const Kernels<MatchingLaunch>& kernels, const MatchingArguments& m) {
  const Calls calls = calls_of({&m.velocity, &m.old_velocity, &m.ref, &m.ema, &m.x0, &m.noise, &m.residual, &m.grad_velocity});
  return kernels.for_calls[int(m.row ? Calls::any : calls)];
}

MatchingLaunch prepared(const MatchingArguments& m) {
  MatchingLaunch launched = {m, walk_of(m, tiles_of(m.rule.size)), {}, true};
  for (const Latent* latent : {&m.velocity, &m.old_velocity, &m.ref, &m.ema, &m.residual, &m.grad_velocity})
    launched.vectors = launched.vectors && takes_vectors(*latent, m.rows);
  launched.vectors = launched.vectors && takes_vectors(m.x0, m.batch) && takes_vectors(m.noise, m.batch);
  return launched;
}

}  // namespace

// The backward pass has no loss.
ScratchSize scratch_of(const MatchingArguments& m) { return m.loss ? scratch_of_loss(m.batch, m.rule.size, kMatchingSums) : ScratchSize{}; }
ScratchSize scratch_of(const NoisingArguments&) { return {}; }

void matching_forward(const MatchingArguments& m, const Queue& queue) {
  if (m.batch == 0) return;
  MatchingLaunch launched = prepared(m);
  launched.scratch = loss_scratch(queue.scratch, m.batch, launched.walk.tiles.by, kMatchingSums, m.is_reduced ? nullptr : m.loss);
  const bool is_drawn = !m.noise.data;
  const auto& kernels =
      m.residual.data ? (is_drawn ? kForwardKept<true> : kForwardKept<false>) : (is_drawn ? kForward<true> : kForward<false>);
  const auto kernel = pick(kernels, m);
  launch("matching_forward", kernel, launched, m.rows * launched.walk.slices * launched.walk.tiles.by, threads_of(m.rule.size), queue);
}

void matching_backward(const MatchingArguments& arguments, const Queue& queue) {
  if (arguments.rule.size == 0) return;
  MatchingArguments m = arguments;
  const bool is_kept = m.residual.data;
  if (is_kept) m.x0 = m.noise = m.old_velocity = {};
  if (is_kept && !m.ref.data && !m.ema.data) m.velocity = {};
  MatchingLaunch launched = prepared(m);
  launched.walk.slices = 1;
  const auto kernel = pick(is_kept ? kBackwardKept : m.noise.data ? kBackward<false> : kBackward<true>, m);
  launch("matching_backward", kernel, launched, m.rows * launched.walk.tiles.by, threads_of(m.rule.size), queue);
}

void add_noise(const NoisingArguments& n, const Queue& queue) {
  NoisingLaunch launched = {n, divisor(tiles_of(n.size)), false};
  launched.vectors = takes_vectors(n.x0, n.batch) && takes_vectors(n.noise, n.batch) && takes_vectors(n.out, n.batch);
  const auto kernel = (n.noise.data ? kAddNoise<false> : kAddNoise<true>).for_calls[int(calls_of({&n.x0, &n.noise, &n.out}))];
  launch("add_noise", kernel, launched, n.size > 0 ? n.batch * launched.tiles.by : 0, threads_of(n.size), queue);
}

std::string matching_loss_why_not(int device) {
  const std::string why_not = load_kernels(
      device, {kForward<false>, kForward<true>, kForwardKept<false>, kForwardKept<true>, kBackward<false>, kBackward<true>, kBackwardKept});
  return why_not.empty() ? load_kernels(device, {kAddNoise<false>, kAddNoise<true>}) : why_not;
}
