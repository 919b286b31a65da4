// The policy loss on CUDA, forward and backward; one launch each. A block takes one tile of one velocity row, a thread eight elements.
#include "policy_loss.h"

#include "../common/latent_cuda.cuh"
#include "../common/siblings_cuda.cuh"

namespace {

constexpr int kPolicySums = 2;  // per sample: of the ratio, of the KL

// What a launch adds to the arguments.
struct PolicyLaunch {
  PolicyArguments p;
  Walk walk;
  LossScratch scratch;  // forward only
  double share;         // of a sample in the loss
  bool vectors;         // whether latents allow 128-bit accesses
};

// kKept: with a residual, which only samples with rows of their own have.
template <Calls kCalls, bool kKept>
FK_DEVICE PolicyLaunch known(PolicyLaunch launch) {
  PolicyArguments& p = launch.p;
  know_dtypes<kCalls>(p.velocity, p.x_t, p.old_velocity, p.velocity_ref, p.x_next, p.noise, p.residual, p.grad_velocity);
  if constexpr (kCalls != Calls::any) p.velocity_uncond = {};
  if constexpr (kCalls != Calls::any || kKept) know_own_rows(launch.walk);
  return launch;
}

FK_DEVICE StepEdge edge_of(const PolicyArguments& p, int64_t sample) {
  return *reinterpret_cast<const StepEdge*>(p.edges + sample * p.edge_stride);
}

FK_DEVICE Place of_sample(const Place& at, int64_t sample) { return {sample, at.first, at.count}; }

// What the samples of a row share, as it lies in memory, the velocity guided; what is not given is 0.
struct RowGroups {
  Group x, velocity, old;  // with guidance the velocity is float32
};
struct Chunk {
  Floats x, velocity, old;
};

template <bool kWhole>
FK_DEVICE RowGroups load_row(const PolicyArguments& p, const Place& at) {
  RowGroups row = {load_if_given<kWhole>(p.x_t, at), load_if_given<kWhole>(p.velocity, at), load_if_given<kWhole>(p.old_velocity, at)};
  if (p.velocity_uncond.data) {
    const Floats uncond = widen(load<kWhole>(p.velocity_uncond, at), p.velocity_uncond.dtype);
    Floats velocity = widen(row.velocity, p.velocity.dtype);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) velocity.v[i] = guided_velocity(velocity.v[i], uncond.v[i], p.guidance_scale);
    row.velocity = narrow(velocity, DType::float32);
  }
  return row;
}

FK_DEVICE Floats velocity_of(const PolicyArguments& p, const RowGroups& row) {
  return widen(row.velocity, p.velocity_uncond.data ? DType::float32 : p.velocity.dtype);
}

FK_DEVICE Chunk chunk_of(const PolicyArguments& p, const RowGroups& row) {
  return {widen(row.x, p.x_t.dtype), velocity_of(p, row), widen(row.old, p.old_velocity.dtype)};
}

// What a sample has of its own, to be loaded ahead; what it is drawn again from (kDrawn) is not: its registers are needed to draw.
template <bool kDrawn>
FK_DEVICE Group load_sample(const PolicyArguments& p, const Place& at, bool is_whole) {
  return kDrawn ? Group{} : load_group(p.x_next, at, is_whole);
}

// x_next: as given, or drawn again around the old velocity's mean.
template <bool kDrawn>
FK_DEVICE Floats next_of(const PolicyArguments& p, const StepEdge& edge, const Chunk& chunk, const Group& group, const Place& at,
                         bool is_whole) {
  if constexpr (!kDrawn) {
    return widen(group, p.x_next.dtype);
  } else {
    Floats next;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) next.v[i] = step_mean(edge, chunk.x.v[i], chunk.old.v[i]);
    if (!(edge.std > 0)) return next;
    const Floats noise = p.noise.data ? widen(load_group(p.noise, at, is_whole), p.noise.dtype) : normals(p.key, at.sample, at.first);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) next.v[i] = step_draw(edge, next.v[i], noise.v[i]);
    return next;
  }
}

template <Ratio kind>
FK_DEVICE float ratio_sum(const StepEdge& edge, const Chunk& chunk, const Floats& next, int count) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < count) sum += ratio_term<kind>(edge, chunk.x.v[i], chunk.velocity.v[i], chunk.old.v[i], next.v[i]);
  return sum;
}

FK_DEVICE float ratio_sum(Ratio kind, const StepEdge& edge, const Chunk& chunk, const Floats& next, int count) {
  if (kind == Ratio::sde) return ratio_sum<Ratio::sde>(edge, chunk, next, count);
  if (kind == Ratio::guard) return ratio_sum<Ratio::guard>(edge, chunk, next, count);
  return ratio_sum<Ratio::recorded>(edge, chunk, next, count);
}

FK_DEVICE Floats residual_of(const PolicyArguments& p, const StepEdge& edge, const Chunk& chunk, const Floats& next) {
  const bool is_old = p.settings.guard && p.old_velocity.data;
  Floats residual;
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    residual.v[i] = ratio_residual(edge, chunk.x.v[i], is_old ? chunk.old.v[i] : chunk.velocity.v[i], next.v[i]);
  return residual;
}

// The whole warp: a sample's loss, statistics and slopes; the last sample of all also writes the loss of the batch.
FK_DEVICE void finish_sample(const PolicyLaunch& launch, int64_t sample, const double (&sums)[kPolicySums]) {
  const PolicyArguments& p = launch.p;
  if (lane_index() == 0) {
    const PolicySample out =
        policy_sample(p.settings, edge_of(p, sample), sums[0], sums[1], p.advantage[sample], p.old_log_prob ? p.old_log_prob[sample] : 0.0f,
                      p.step_weight ? p.step_weight[sample] : 1.0f, p.kl_coef ? p.kl_coef[sample] : p.kl_value);
    p.log_ratio[sample] = out.log_ratio;
    p.ratio[sample] = out.ratio;
    p.kl[sample] = out.kl;
    p.clipped_low[sample] = out.clipped_low;
    p.clipped_high[sample] = out.clipped_high;
    p.slopes[2 * sample] = out.slopes[0];
    p.slopes[2 * sample + 1] = out.slopes[1];
    launch.scratch.sample_loss[sample] = is_out_of_range(launch.walk, sample) ? NAN : out.loss;
  }
  if (p.reduction != Reduction::none) reduce_loss(launch.scratch, sample, p.batch, launch.share, p.loss);
}

FK_DEVICE float kl_sum(const Floats& velocity, const Floats& ref, int count) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < count) sum += kl_term(velocity.v[i], ref.v[i]);
  return sum;
}

template <bool kDrawn, bool kKept>
FK_DEVICE float ratio_sum(const PolicyArguments& p, const RowGroups& row, const Group& group, const Place& at, bool is_whole) {
  if (p.settings.ratio == Ratio::on_policy) return 0.0f;
  const StepEdge edge = edge_of(p, at.sample);  // after the latents: they do not wait for it
  const Chunk chunk = chunk_of(p, row);
  const Floats next = next_of<kDrawn>(p, edge, chunk, group, at, is_whole);
  if constexpr (kKept) store_group(p.residual, at, is_whole, residual_of(p, edge, chunk, next));
  return ratio_sum(p.settings.ratio, edge, chunk, next, at.count);
}

// The sums of a sample that has its row alone: all loads in flight before the first is used.
template <bool kWhole, bool kDrawn, bool kKept>
FK_DEVICE void add_alone(const PolicyArguments& p, const Place& at, float (&sums)[kPolicySums]) {
  const RowGroups row = load_row<kWhole>(p, at);
  const Group group = load_sample<kDrawn>(p, at, kWhole);
  const Group ref = load_if_given<kWhole>(p.velocity_ref, at);
  sums[0] = ratio_sum<kDrawn, kKept>(p, row, group, at, kWhole);
  if (p.velocity_ref.data) sums[1] = kl_sum(velocity_of(p, row), widen(ref, p.velocity_ref.dtype), at.count);
}

// kDrawn: x_next is drawn again. The registers that takes would cost the usual loss half its threads. kKept: the residual is stored.
template <Calls kCalls, bool kDrawn, bool kKept>
__global__ void __launch_bounds__(256, kCalls == Calls::any && !kKept ? 2 : 0)
    policy_forward_kernel(const __grid_constant__ PolicyLaunch given) {
  const PolicyLaunch launch = known<kCalls, kKept>(given);
  const PolicyArguments& p = launch.p;
  const RowTile tile = row_tile_of_block(launch.walk);
  const Place at = place_of_thread(tile.row, tile.tile, p.size);
  const bool is_whole = launch.vectors && at.count == kGroup;
  const auto finish = [&](int64_t sample, const double (&sums)[kPolicySums]) { finish_sample(launch, sample, sums); };
  const unsigned used = (p.settings.ratio == Ratio::on_policy ? 0u : 1u) | (p.velocity_ref.data ? 2u : 0u);
  if constexpr (kCalls != Calls::any || kKept) {
    float sums[kPolicySums] = {};
    if (is_whole) add_alone<true, kDrawn, kKept>(p, at, sums);
    else if (at.count > 0) add_alone<false, kDrawn, kKept>(p, at, sums);
    sum_alone(tile, launch.walk, launch.scratch.tiles, used, sums, finish);
  } else {
    const auto fetch = [&](int64_t sample) { return load_sample<kDrawn>(p, of_sample(at, sample), is_whole); };
    const RowGroups row = is_whole ? load_row<true>(p, at) : load_row<false>(p, at);
    const Group ref = load_group(p.velocity_ref, at, is_whole);
    const Group only = launch.walk.row ? Group{} : fetch(tile.row);
    const float kl = p.velocity_ref.data ? kl_sum(velocity_of(p, row), widen(ref, p.velocity_ref.dtype), at.count) : 0.0f;
    const auto term = [&](int64_t sample, const Group& group, float (&sums)[kPolicySums]) {
      sums[0] = ratio_sum<kDrawn, false>(p, row, group, of_sample(at, sample), is_whole);
      sums[1] = kl;
    };
    sum_siblings<kPolicySums>(launch.walk, tile, launch.scratch.tiles, used, only, fetch, term, finish);
  }
}

FK_DEVICE float weight(const PolicyArguments& p, int64_t sample, int which) {
  const float slope = p.slopes[2 * sample + which];
  return is_silent(slope) ? 0.0f : p.grad[sample * p.grad_stride] * slope;
}

// Nothing is read until a slope asks for it.
template <Calls kCalls, bool kDrawn>
__global__ void __launch_bounds__(256) policy_backward_kernel(const __grid_constant__ PolicyLaunch given) {
  const PolicyLaunch launch = known<kCalls, false>(given);
  const PolicyArguments& p = launch.p;
  const RowTile tile = row_tile_of_block(launch.walk);
  const Place at = place_of_thread(tile.row, tile.tile, p.size);
  const bool is_whole = launch.vectors && at.count == kGroup;
  RowGroups row = {};
  Floats gradient = {};
  bool is_loaded = false;
  float kl_weight = 0;
  const Places places = places_of(launch.walk, tile);
  for (int64_t base = places.begin; base < places.end; base += kWarp) {
    const bool member = is_member(launch.walk, tile.row, base + lane_index(), places);
    const int64_t mine = member ? sample_at(launch.walk, base + lane_index()) : 0;
    const float slope = member ? weight(p, mine, 0) : 0.0f;
    const bool is_read = member && !is_silent(p.slopes[2 * mine]);
    const float kl_slope = member && p.velocity_ref.data ? weight(p, mine, 1) : 0.0f;
    for (unsigned left = __ballot_sync(kAllLanes, kl_slope != 0); left; left &= left - 1)
      kl_weight += __shfl_sync(kAllLanes, kl_slope, __ffs(left) - 1);
    for (unsigned left = __ballot_sync(kAllLanes, is_read); left; left &= left - 1) {
      const int lane = __ffs(left) - 1;
      const float scale = __shfl_sync(kAllLanes, slope, lane);
      if (!is_loaded) row = is_whole ? load_row<true>(p, at) : load_row<false>(p, at);
      is_loaded = true;
      const Place there = of_sample(at, __shfl_sync(kAllLanes, mine, lane));
      const Group group = load_sample<kDrawn>(p, there, is_whole);
      const StepEdge edge = edge_of(p, there.sample);
      const Chunk chunk = chunk_of(p, row);
      const Floats residual = residual_of(p, edge, chunk, next_of<kDrawn>(p, edge, chunk, group, there, is_whole));
#pragma unroll
      for (int i = 0; i < kGroup; ++i) gradient.v[i] += scale * residual.v[i];
    }
  }
  if (kl_weight != 0) {
    if (!is_loaded) row = is_whole ? load_row<true>(p, at) : load_row<false>(p, at);
    const Floats ref = widen(load_group(p.velocity_ref, at, is_whole), p.velocity_ref.dtype), velocity = velocity_of(p, row);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) gradient.v[i] += kl_weight * (velocity.v[i] - ref.v[i]);
  }
  store_group(p.grad_velocity, at, is_whole, gradient);
}

// The same from the residual that forward has kept of samples with rows of their own, in whose memory the gradient is left.
template <Calls kCalls>
__global__ void __launch_bounds__(256) policy_backward_kept_kernel(const __grid_constant__ PolicyLaunch given) {
  const PolicyLaunch launch = known<kCalls, true>(given);
  const PolicyArguments& p = launch.p;
  const RowTile tile = row_tile_of_block(launch.walk, true);
  const Place at = place_of_thread(tile.row, tile.tile, p.size);
  const bool is_whole = launch.vectors && at.count == kGroup, is_read = !is_silent(p.slopes[2 * at.sample]);
  const float scale = weight(p, at.sample, 0), kl_scale = p.velocity_ref.data ? weight(p, at.sample, 1) : 0.0f;
  const Floats residual = widen(is_read ? load_group(p.residual, at, is_whole) : Group{}, DType::float32);
  Floats gradient = {};
#pragma unroll
  for (int i = 0; i < kGroup; ++i) gradient.v[i] += scale * residual.v[i];
  if (kl_scale != 0) {
    const RowGroups row = is_whole ? load_row<true>(p, at) : load_row<false>(p, at);
    const Floats ref = widen(load_group(p.velocity_ref, at, is_whole), p.velocity_ref.dtype), velocity = velocity_of(p, row);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) gradient.v[i] += kl_scale * (velocity.v[i] - ref.v[i]);
  }
  store_group(p.residual, at, is_whole, gradient);
}

// Tells what the kernels have to know of the call, and picks one.
auto pick(const Kernels<PolicyLaunch>& kernels, PolicyLaunch& launched) {
  const PolicyArguments& p = launched.p;
  const auto all = {&p.velocity,      &p.x_t,    &p.old_velocity, &p.velocity_uncond, &p.velocity_ref,
                    &p.grad_velocity, &p.x_next, &p.noise,        &p.residual};
  launched.vectors = true;
  for (const Latent* latent : all)
    launched.vectors = launched.vectors && takes_vectors(*latent, latent == &p.x_next || latent == &p.noise ? p.batch : p.rows);
  return kernels.for_calls[int(p.row || p.velocity_uncond.data ? Calls::any : calls_of(all))];
}

template <bool kDrawn>
constexpr Kernels<PolicyLaunch> kForward = {{policy_forward_kernel<Calls::any, kDrawn, false>,
                                             policy_forward_kernel<Calls::plain_float32, kDrawn, false>,
                                             policy_forward_kernel<Calls::plain_bfloat16, kDrawn, false>}};
// A residual is float32: there are two of these.
template <bool kDrawn>
constexpr Kernels<PolicyLaunch> kForwardKept = {{policy_forward_kernel<Calls::any, kDrawn, true>,
                                                 policy_forward_kernel<Calls::plain_float32, kDrawn, true>,
                                                 policy_forward_kernel<Calls::any, kDrawn, true>}};
constexpr Kernels<PolicyLaunch> kBackwardKept = {
    {policy_backward_kept_kernel<Calls::any>, policy_backward_kept_kernel<Calls::plain_float32>, policy_backward_kept_kernel<Calls::any>}};
template <bool kDrawn>
constexpr Kernels<PolicyLaunch> kBackward = {{policy_backward_kernel<Calls::any, kDrawn>,
                                              policy_backward_kernel<Calls::plain_float32, kDrawn>,
                                              policy_backward_kernel<Calls::plain_bfloat16, kDrawn>}};

}  // namespace

// The backward pass has no loss.
ScratchSize scratch_of(const PolicyArguments& p) { return p.loss ? scratch_of_loss(p.batch, p.size, kPolicySums) : ScratchSize{}; }

void policy_forward(const PolicyArguments& arguments, const Queue& queue) {
  if (arguments.batch == 0) return;
  PolicyLaunch launched = {arguments, {}, {}, 1.0, false};
  PolicyArguments& p = launched.p;
  if (p.settings.ratio == Ratio::on_policy) p.x_t = p.x_next = {};  // then the log-ratio needs no data, and maybe nothing does
  if (p.settings.ratio == Ratio::on_policy && !p.velocity_ref.data) p.velocity = p.velocity_uncond = {};
  if (!p.velocity.data) p.size = 0;
  launched.walk = walk_of(p, tiles_of(p.size));
  launched.scratch =
      loss_scratch(queue.scratch, p.batch, launched.walk.tiles.by, kPolicySums, p.reduction == Reduction::none ? p.loss : nullptr);
  if (p.reduction == Reduction::mean) launched.share = 1.0 / double(p.batch);
  const bool is_drawn = !(p.settings.ratio == Ratio::on_policy || p.x_next.data);
  const auto& kernels =
      p.residual.data ? (is_drawn ? kForwardKept<true> : kForwardKept<false>) : (is_drawn ? kForward<true> : kForward<false>);
  const auto kernel = pick(kernels, launched);
  launch("policy_forward", kernel, launched, p.rows * launched.walk.slices * launched.walk.tiles.by, threads_of(p.size), queue);
}

void policy_backward(const PolicyArguments& arguments, const Queue& queue) {
  if (arguments.size == 0) return;
  PolicyLaunch launched = {arguments, {}, {}, 1.0, false};
  PolicyArguments& p = launched.p;
  const bool is_kept = p.residual.data, is_drawn = !p.x_next.data;
  const bool from_velocity = !is_kept && !(p.settings.guard && p.old_velocity.data);
  if (is_kept) p.x_t = p.x_next = p.noise = p.old_velocity = {};
  if (!p.settings.guard && !is_drawn) p.old_velocity = {};  // needed neither to draw nor for the residual
  if (!from_velocity && !p.velocity_ref.data) p.velocity = p.velocity_uncond = {};
  launched.walk = walk_of(p, tiles_of(p.size));
  launched.walk.slices = 1;
  const auto kernel = pick(is_kept ? kBackwardKept : is_drawn ? kBackward<true> : kBackward<false>, launched);
  launch("policy_backward", kernel, launched, p.rows * launched.walk.tiles.by, threads_of(p.size), queue);
}

std::string policy_loss_why_not(int device) {
  return load_kernels(
      device, {kForward<false>, kForward<true>, kForwardKept<false>, kForwardKept<true>, kBackward<false>, kBackward<true>, kBackwardKept});
}
