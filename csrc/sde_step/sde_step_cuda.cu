// The step on CUDA: draw, replay, its gradient; one launch each. A block takes one tile of one sample, a thread eight elements.
#include "sde_step.h"

#include "../common/latent_cuda.cuh"
#include "../common/sums_cuda.cuh"

namespace {

// What a launch adds to the arguments.
struct StepLaunch {
  StepArguments s;
  Scratch scratch;
  Divisor tiles;  // of a sample
  bool vectors;   // whether latents allow 128-bit accesses
};
struct NormalLaunch {
  NormalArguments n;
  Divisor tiles;
};

struct Tile {
  int64_t sample, index;
};

FK_DEVICE Tile tile_of_block(const Divisor& tiles, unsigned block = blockIdx.x) {
  const unsigned sample = quotient(block, tiles);
  return {int64_t(sample), int64_t(block - sample * tiles.by)};
}

FK_DEVICE StepEdge edge_of(const StepArguments& s, int64_t sample) {
  return *reinterpret_cast<const StepEdge*>(s.edges + sample * s.edge_stride);
}

template <Calls kCalls>
FK_DEVICE StepArguments known(StepArguments s) {
  know_dtypes<kCalls>(s.x_t, s.velocity, s.velocity_uncond, s.noise, s.x_next, s.x0, s.history[0], s.history[1], s.history[2], s.residual,
                      s.grad);
  s.mean.dtype = s.grad_mean.dtype = DType::float32;
  return s;
}

// What a thread reads to know x_t and the velocity: all loads in flight before the first is used.
struct Inputs {
  Group x, velocity;  // with guidance the velocity is float32
};

template <bool kWhole>
FK_DEVICE Inputs load_inputs(const StepArguments& s, const Place& at) {
  Inputs in = {load<kWhole>(s.x_t, at), load<kWhole>(s.velocity, at)};
  if (s.velocity_uncond.data) {
    const Floats uncond = widen(load<kWhole>(s.velocity_uncond, at), s.velocity_uncond.dtype);
    Floats velocity = widen(in.velocity, s.velocity.dtype);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) velocity.v[i] = guided_velocity(velocity.v[i], uncond.v[i], s.guidance_scale);
    in.velocity = narrow(velocity, DType::float32);
  }
  return in;
}

FK_DEVICE Floats velocity_of(const StepArguments& s, const Inputs& in) {
  return widen(in.velocity, s.velocity_uncond.data ? DType::float32 : s.velocity.dtype);
}

FK_DEVICE Floats mean_of(const StepEdge& edge, const Floats& x, const Floats& velocity) {
  Floats mean;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) mean.v[i] = step_mean(edge, x.v[i], velocity.v[i]);
  return mean;
}

FK_DEVICE Floats residual_of(const Floats& next, const Floats& mean) {
  Floats residual;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) residual.v[i] = step_residual(next.v[i], mean.v[i]);
  return residual;
}

FK_DEVICE float sum_of_squares(const Floats& residual, int count) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < count) sum += residual.v[i] * residual.v[i];
  return sum;
}

FK_DEVICE void finish(const StepLaunch& launch, const Tile& tile, float sum) {
  const StepArguments& s = launch.s;
  const StepEdge edge = edge_of(s, tile.sample);
  double totals[1];
  if (sample_sums(launch.scratch, 1u, {sum}, tile.sample, tile.index, launch.tiles.by, totals) && lane_index() == 0)
    s.log_prob[tile.sample] = step_log_prob(edge, totals[0], s.size);
}

// Noise given, or made and then float32; 0 where there is neither.
template <bool kWhole>
FK_DEVICE Group noise_of(const StepArguments& s, const Place& at) {
  if (s.noise.data) return load<kWhole>(s.noise, at);  // not only where std != 0: that would wait for the edge
  return s.key.sample_id ? narrow(normals(s.key, at.sample, at.first), DType::float32) : Group{};
}

// Writes x_next (and x0) and returns the sum of squares of what is stored, after rounding, minus the mean. kMore: the mean is written
// where it is wanted, and x_next may be rounded first.
template <bool kWhole, int kHistory, bool kMore>
FK_DEVICE float draw(const StepArguments& s, const Place& at) {
  const Inputs in = load_inputs<kWhole>(s, at);
  Group earlier[kHistory + 1];
#pragma unroll
  for (int j = 0; j < kHistory; ++j)
    if (j < s.num_history) earlier[j] = load<kWhole>(s.history[j], at);
  const StepEdge edge = edge_of(s, at.sample);  // after the latents: they do not wait for it
  const Group noises = noise_of<kWhole>(s, at);

  const Floats x = widen(in.x, s.x_t.dtype), velocity = velocity_of(s, in);
  if (s.x0.data) {
    Floats x0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x0.v[i] = predicted_x0(edge, x.v[i], velocity.v[i]);
    store<kWhole>(s.x0, at, narrow(x0, s.x0.dtype));
  }
  Floats mean = mean_of(edge, x, velocity);
#pragma unroll
  for (int j = 0; j < kHistory; ++j) {
    if (j >= s.num_history) continue;
    const Floats values = widen(earlier[j], s.history[j].dtype);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) mean.v[i] += edge.h[j] * values.v[i];
  }
  Floats next = mean;
  if (edge.std != 0 && (s.noise.data || s.key.sample_id)) {
    const Floats noise = widen(noises, s.noise.data ? s.noise.dtype : DType::float32);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) next.v[i] = step_draw(edge, mean.v[i], noise.v[i]);
  }
  if constexpr (kMore) {
    if (s.mean.data) store<kWhole>(s.mean, at, narrow(mean, DType::float32));
    if (s.rounded != DType::float32) next = widen(narrow(next, s.rounded), s.rounded);
  }
  const Group stored = narrow(next, s.x_next.dtype);
  store<kWhole>(s.x_next, at, stored);
  return sum_of_squares(residual_of(widen(stored, s.x_next.dtype), mean), at.count);
}

// What a replay leaves for its gradient.
enum class Keeps : int { nothing, residual, mean };

template <bool kWhole, Keeps kKeeps>
FK_DEVICE float replay(const StepArguments& s, const Place& at) {
  const Inputs in = load_inputs<kWhole>(s, at);
  const Group next = load<kWhole>(s.x_next, at);
  const StepEdge edge = edge_of(s, at.sample);
  const Floats mean = mean_of(edge, widen(in.x, s.x_t.dtype), velocity_of(s, in));
  const Floats residual = residual_of(widen(next, s.x_next.dtype), mean);
  if constexpr (kKeeps == Keeps::residual) store<kWhole>(s.residual, at, narrow(residual, DType::float32));
  if constexpr (kKeeps == Keeps::mean) store<kWhole>(s.mean, at, narrow(mean, DType::float32));
  return sum_of_squares(residual, at.count);
}

// Of d log_prob / d velocity what a sample's elements share.
FK_DEVICE float gradient_scale(const StepArguments& s, const StepEdge& edge, int64_t sample) {
  const float guidance = s.velocity_uncond.data ? s.guidance_scale : 1.0f;
  return s.grad_out[sample * s.grad_stride] * 2.0f * edge.k * edge.b * guidance / float(s.size);  // every thread: no doubles
}

FK_DEVICE Floats gradient_of(float scale, const Floats& residual) {
  Floats gradient;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) gradient.v[i] = step_gradient(scale, residual.v[i]);
  return gradient;
}

template <bool kWhole>
FK_DEVICE void replay_backward(const StepArguments& s, const Place& at) {
  const Inputs in = load_inputs<kWhole>(s, at);
  const Group stored = load<kWhole>(s.x_next, at);
  const StepEdge edge = edge_of(s, at.sample);
  const float scale = gradient_scale(s, edge, at.sample);
  const Floats mean = mean_of(edge, widen(in.x, s.x_t.dtype), velocity_of(s, in)), next = widen(stored, s.x_next.dtype);
  store<kWhole>(s.grad, at, narrow(gradient_of(scale, residual_of(next, mean)), s.grad.dtype));
}

template <bool kWhole>
FK_DEVICE void replay_backward_kept(const StepArguments& s, const Place& at) {
  const Floats residual = widen(load<kWhole>(s.residual, at), DType::float32);
  const float scale = gradient_scale(s, edge_of(s, at.sample), at.sample);
  store<kWhole>(s.residual, at, narrow(gradient_of(scale, residual), DType::float32));
}

// Both gradients that come in, from the mean: one of them may be absent, and is not read for.
template <bool kWhole>
FK_DEVICE void mean_backward(const StepArguments& s, const Place& at) {
  Group stored = {}, center = {}, of_mean = {};
  if (s.grad_out) stored = load<kWhole>(s.x_next, at), center = load<kWhole>(s.mean, at);
  if (s.grad_mean.data) of_mean = load<kWhole>(s.grad_mean, at);
  const StepEdge edge = edge_of(s, at.sample);
  const float by_mean = edge.b * s.guidance_scale;
  Floats gradient = {};
  if (s.grad_out) {
    const float scale = s.grad_out[at.sample * s.grad_stride] * 2.0f * edge.k * edge.b * s.guidance_scale / float(s.size);
    gradient = gradient_of(scale, residual_of(widen(stored, s.x_next.dtype), widen(center, DType::float32)));
  }
  if (s.grad_mean.data) {
    const Floats given = widen(of_mean, DType::float32);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) gradient.v[i] += mean_gradient(by_mean, given.v[i]);
  }
  store<kWhole>(s.grad, at, narrow(gradient, s.grad.dtype));
}

template <Calls kCalls, int kHistory, bool kMore>
FK_DEVICE void draw_tile(const StepLaunch& launch) {
  const StepArguments s = known<kCalls>(launch.s);
  const Tile tile = tile_of_block(launch.tiles);
  const Place at = place_of_thread(tile.sample, tile.index, s.size);
  float sum = 0;
  if (launch.vectors && at.count == kGroup) sum = draw<true, kHistory, kMore>(s, at);
  else if (at.count > 0) sum = draw<false, kHistory, kMore>(s, at);
  if (s.log_prob) finish(launch, tile, sum);
}

constexpr int draw_blocks(Calls calls, int history) { return history == 0 ? 0 : calls == Calls::plain_bfloat16 ? 3 : 2; }

// kHistory: how many earlier predictions there may be. Their registers would cost the plain draw half its threads.
template <Calls kCalls, int kHistory>
__global__ void __launch_bounds__(256, draw_blocks(kCalls, kHistory)) sde_draw_kernel(const __grid_constant__ StepLaunch launch) {
  draw_tile<kCalls, kHistory, false>(launch);
}

template <Calls kCalls, int kHistory>
__global__ void __launch_bounds__(256, draw_blocks(kCalls, kHistory)) sde_draw_mean_kernel(const __grid_constant__ StepLaunch launch) {
  draw_tile<kCalls, kHistory, true>(launch);
}

template <Calls kCalls, Keeps kKeeps>
FK_DEVICE void replay_tile(const StepLaunch& launch) {
  const StepArguments s = known<kCalls>(launch.s);
  const Tile tile = tile_of_block(launch.tiles);
  const Place at = place_of_thread(tile.sample, tile.index, s.size);
  float sum = 0;
  if (launch.vectors && at.count == kGroup) sum = replay<true, kKeeps>(s, at);
  else if (at.count > 0) sum = replay<false, kKeeps>(s, at);
  finish(launch, tile, sum);
}

// kKept: the residual is stored.
template <Calls kCalls, bool kKept>
__global__ void __launch_bounds__(256) sde_replay_kernel(const __grid_constant__ StepLaunch launch) {
  replay_tile<kCalls, kKept ? Keeps::residual : Keeps::nothing>(launch);
}

template <Calls kCalls>
__global__ void __launch_bounds__(256) sde_replay_mean_kernel(const __grid_constant__ StepLaunch launch) {
  replay_tile<kCalls, Keeps::mean>(launch);
}

template <Calls kCalls>
__global__ void __launch_bounds__(256) sde_replay_backward_kernel(const __grid_constant__ StepLaunch launch) {
  const StepArguments s = known<kCalls>(launch.s);
  const Tile tile = tile_of_block(launch.tiles);
  const Place at = place_of_thread(tile.sample, tile.index, s.size);
  if (launch.vectors && at.count == kGroup) replay_backward<true>(s, at);
  else if (at.count > 0) replay_backward<false>(s, at);
}

template <Calls kCalls>
__global__ void __launch_bounds__(256) sde_mean_backward_kernel(const __grid_constant__ StepLaunch launch) {
  const StepArguments s = known<kCalls>(launch.s);
  const Tile tile = tile_of_block(launch.tiles);
  const Place at = place_of_thread(tile.sample, tile.index, s.size);
  if (launch.vectors && at.count == kGroup) mean_backward<true>(s, at);
  else if (at.count > 0) mean_backward<false>(s, at);
}

// From the residual, in whose memory the gradient is left. The first blocks, which run first, take the last tiles, of which caches still
// hold what the replay has written.
__global__ void __launch_bounds__(256) sde_replay_backward_kept_kernel(const __grid_constant__ StepLaunch launch) {
  StepArguments s = launch.s;
  s.residual.dtype = DType::float32;
  const Tile tile = tile_of_block(launch.tiles, gridDim.x - 1 - blockIdx.x);
  const Place at = place_of_thread(tile.sample, tile.index, s.size);
  if (launch.vectors && at.count == kGroup) replay_backward_kept<true>(s, at);
  else if (at.count > 0) replay_backward_kept<false>(s, at);
}

__global__ void __launch_bounds__(256) fill_philox_kernel(const __grid_constant__ NormalLaunch launch) {
  const NormalArguments& n = launch.n;
  const Tile tile = tile_of_block(launch.tiles);
  const Place at = place_of_thread(tile.sample, tile.index, n.size);
  if (at.count == 0) return;
  const Latent out = {reinterpret_cast<char*>(n.out), n.size, DType::float32};
  const Group bits = narrow(normals(n.key, at.sample, at.first), DType::float32);
  if (n.size % 4 == 0 && at.count == kGroup) store<true>(out, at, bits);
  else store<false>(out, at, bits);
}

template <int kHistory>
constexpr Kernels<StepLaunch> kDraw = {{sde_draw_kernel<Calls::any, kHistory>, sde_draw_kernel<Calls::plain_float32, kHistory>,
                                        sde_draw_kernel<Calls::plain_bfloat16, kHistory>}};
template <int kHistory>
constexpr Kernels<StepLaunch> kDrawMean = {{sde_draw_mean_kernel<Calls::any, kHistory>,
                                            sde_draw_mean_kernel<Calls::plain_float32, kHistory>,
                                            sde_draw_mean_kernel<Calls::plain_bfloat16, kHistory>}};
constexpr Kernels<StepLaunch> kReplay = {{sde_replay_kernel<Calls::any, false>, sde_replay_kernel<Calls::plain_float32, false>,
                                          sde_replay_kernel<Calls::plain_bfloat16, false>}};
// A residual is float32: there are two of these, and one.
constexpr Kernels<StepLaunch> kReplayKept = {
    {sde_replay_kernel<Calls::any, true>, sde_replay_kernel<Calls::plain_float32, true>, sde_replay_kernel<Calls::any, true>}};
constexpr Kernels<StepLaunch> kReplayBackwardKept = {
    {sde_replay_backward_kept_kernel, sde_replay_backward_kept_kernel, sde_replay_backward_kept_kernel}};
constexpr Kernels<StepLaunch> kReplayBackward = {{sde_replay_backward_kernel<Calls::any>, sde_replay_backward_kernel<Calls::plain_float32>,
                                                  sde_replay_backward_kernel<Calls::plain_bfloat16>}};

constexpr Kernels<StepLaunch> kReplayMean = {
    {sde_replay_mean_kernel<Calls::any>, sde_replay_mean_kernel<Calls::plain_float32>, sde_replay_mean_kernel<Calls::plain_bfloat16>}};
constexpr Kernels<StepLaunch> kMeanBackward = {{sde_mean_backward_kernel<Calls::any>, sde_mean_backward_kernel<Calls::plain_float32>,
                                                sde_mean_backward_kernel<Calls::plain_bfloat16>}};

// The mean and its gradient are float32 in all of them, and not among the latents that decide which kernel it is.
void launch_step(const char* name, const Kernels<StepLaunch>& kernels, const StepArguments& s, const Queue& queue) {
  StepLaunch launched = {s, queue.scratch, divisor(tiles_of(s.size)), true};
  const std::initializer_list<const Latent*> latents = {&s.x_t,        &s.velocity,   &s.velocity_uncond, &s.noise,    &s.x_next, &s.x0,
                                                        &s.history[0], &s.history[1], &s.history[2],      &s.residual, &s.grad};
  for (const Latent* latent : latents) launched.vectors = launched.vectors && takes_vectors(*latent, s.batch);
  for (const Latent* latent : {&s.mean, &s.grad_mean}) launched.vectors = launched.vectors && takes_vectors(*latent, s.batch);
  launch(name, kernels.for_calls[int(calls_of(latents))], launched, s.batch * launched.tiles.by, threads_of(s.size), queue);
}

}  // namespace

ScratchSize scratch_of(const StepArguments& s) { return s.log_prob ? scratch_of_samples(s.batch, s.size) : ScratchSize{}; }
ScratchSize scratch_of(const NormalArguments&) { return {}; }

void sde_draw(const StepArguments& s, const Queue& queue) { launch_step("sde_draw", s.num_history ? kDraw<3> : kDraw<0>, s, queue); }

void sde_replay(const StepArguments& s, const Queue& queue) {
  launch_step("sde_replay", s.residual.data ? kReplayKept : kReplay, s, queue);
}

void sde_draw_mean(const StepArguments& s, const Queue& queue) {
  launch_step("sde_draw_mean", s.num_history ? kDrawMean<3> : kDrawMean<0>, s, queue);
}

void sde_replay_mean(const StepArguments& s, const Queue& queue) { launch_step("sde_replay_mean", kReplayMean, s, queue); }

void sde_mean_backward(const StepArguments& s, const Queue& queue) { launch_step("sde_mean_backward", kMeanBackward, s, queue); }

void sde_replay_backward(const StepArguments& s, const Queue& queue) {
  launch_step("sde_replay_backward", s.residual.data ? kReplayBackwardKept : kReplayBackward, s, queue);
}

void fill_philox(const NormalArguments& n, const Queue& queue) {
  const NormalLaunch launched = {n, divisor(tiles_of(n.size))};
  launch("fill_philox", fill_philox_kernel, launched, n.size > 0 ? n.batch * launched.tiles.by : 0, threads_of(n.size), queue);
}

std::string sde_step_why_not(int device) {
  const std::string why_not = load_kernels<NormalLaunch>(device, {{{fill_philox_kernel, fill_philox_kernel, fill_philox_kernel}}});
  if (!why_not.empty()) return why_not;
  return load_kernels(device, {kDraw<0>, kDraw<3>, kDrawMean<0>, kDrawMean<3>, kReplay, kReplayKept, kReplayMean, kReplayBackward,
                               kReplayBackwardKept, kMeanBackward});
}
