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

FK_DEVICE Tile tile_of_block(const Divisor& tiles) {
  const unsigned sample = quotient(blockIdx.x, tiles);
  return {int64_t(sample), int64_t(blockIdx.x - sample * tiles.by)};
}

FK_DEVICE StepEdge edge_of(const StepArguments& s, int64_t sample) {
  return *reinterpret_cast<const StepEdge*>(s.edges + sample * s.edge_stride);
}

template <Calls kCalls>
FK_DEVICE StepArguments known(StepArguments s) {
  know_dtypes<kCalls>(s.x_t, s.velocity, s.velocity_uncond, s.noise, s.x_next, s.x0, s.history[0], s.history[1], s.history[2], s.grad);
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

FK_DEVICE float sum_of_squares(const Floats& value, const Floats& mean, int count) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const float r = value.v[i] - mean.v[i];
    if (i < count) sum += r * r;
  }
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

// Writes x_next (and x0) and returns the sum of squares of what is stored, after rounding, minus the mean.
template <bool kWhole, int kHistory>
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
  const Group stored = narrow(next, s.x_next.dtype);
  store<kWhole>(s.x_next, at, stored);
  return sum_of_squares(widen(stored, s.x_next.dtype), mean, at.count);
}

template <bool kWhole>
FK_DEVICE float replay(const StepArguments& s, const Place& at) {
  const Inputs in = load_inputs<kWhole>(s, at);
  const Group next = load<kWhole>(s.x_next, at);
  const StepEdge edge = edge_of(s, at.sample);
  const Floats mean = mean_of(edge, widen(in.x, s.x_t.dtype), velocity_of(s, in));
  return sum_of_squares(widen(next, s.x_next.dtype), mean, at.count);
}

template <bool kWhole>
FK_DEVICE void replay_backward(const StepArguments& s, const Place& at) {
  const Inputs in = load_inputs<kWhole>(s, at);
  const Group stored = load<kWhole>(s.x_next, at);
  const StepEdge edge = edge_of(s, at.sample);
  const float guidance = s.velocity_uncond.data ? s.guidance_scale : 1.0f;
  const float scale =
      s.grad_out[at.sample * s.grad_stride] * 2.0f * edge.k * edge.b * guidance / float(s.size);  // every thread: no doubles
  const Floats mean = mean_of(edge, widen(in.x, s.x_t.dtype), velocity_of(s, in)), next = widen(stored, s.x_next.dtype);
  Floats slope;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) slope.v[i] = step_gradient(scale, next.v[i], mean.v[i]);
  store<kWhole>(s.grad, at, narrow(slope, s.grad.dtype));
}

// kHistory: how many earlier predictions there may be. Their registers would cost the plain draw half its threads.
template <Calls kCalls, int kHistory>
__global__ void __launch_bounds__(256, kHistory == 0                     ? 0
                                       : kCalls == Calls::plain_bfloat16 ? 3
                                                                         : 2) sde_draw_kernel(const __grid_constant__ StepLaunch launch) {
  const StepArguments s = known<kCalls>(launch.s);
  const Tile tile = tile_of_block(launch.tiles);
  const Place at = place_of_thread(tile.sample, tile.index, s.size);
  float sum = 0;
  if (launch.vectors && at.count == kGroup) sum = draw<true, kHistory>(s, at);
  else if (at.count > 0) sum = draw<false, kHistory>(s, at);
  if (s.log_prob) finish(launch, tile, sum);
}

template <Calls kCalls>
__global__ void __launch_bounds__(256) sde_replay_kernel(const __grid_constant__ StepLaunch launch) {
  const StepArguments s = known<kCalls>(launch.s);
  const Tile tile = tile_of_block(launch.tiles);
  const Place at = place_of_thread(tile.sample, tile.index, s.size);
  float sum = 0;
  if (launch.vectors && at.count == kGroup) sum = replay<true>(s, at);
  else if (at.count > 0) sum = replay<false>(s, at);
  finish(launch, tile, sum);
}

template <Calls kCalls>
__global__ void __launch_bounds__(256) sde_replay_backward_kernel(const __grid_constant__ StepLaunch launch) {
  const StepArguments s = known<kCalls>(launch.s);
  const Tile tile = tile_of_block(launch.tiles);
  const Place at = place_of_thread(tile.sample, tile.index, s.size);
  if (launch.vectors && at.count == kGroup) replay_backward<true>(s, at);
  else if (at.count > 0) replay_backward<false>(s, at);
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
constexpr Kernels<StepLaunch> kReplay = {
    {sde_replay_kernel<Calls::any>, sde_replay_kernel<Calls::plain_float32>, sde_replay_kernel<Calls::plain_bfloat16>}};
constexpr Kernels<StepLaunch> kReplayBackward = {{sde_replay_backward_kernel<Calls::any>, sde_replay_backward_kernel<Calls::plain_float32>,
                                                  sde_replay_backward_kernel<Calls::plain_bfloat16>}};

void launch_step(const char* name, const Kernels<StepLaunch>& kernels, const StepArguments& s, const Queue& queue) {
  StepLaunch launched = {s, queue.scratch, divisor(tiles_of(s.size)), true};
  const std::initializer_list<const Latent*> latents = {&s.x_t, &s.velocity,   &s.velocity_uncond, &s.noise,      &s.x_next,
                                                        &s.x0,  &s.history[0], &s.history[1],      &s.history[2], &s.grad};
  for (const Latent* latent : latents) launched.vectors = launched.vectors && takes_vectors(*latent, s.batch);
  launch(name, kernels.for_calls[int(calls_of(latents))], launched, s.batch * launched.tiles.by, threads_of(s.size), queue);
}

}  // namespace

ScratchSize scratch_of(const StepArguments& s) { return s.log_prob ? scratch_of_samples(s.batch, s.size) : ScratchSize{}; }
ScratchSize scratch_of(const NormalArguments&) { return {}; }

void sde_draw(const StepArguments& s, const Queue& queue) { launch_step("sde_draw", s.num_history ? kDraw<3> : kDraw<0>, s, queue); }

void sde_replay(const StepArguments& s, const Queue& queue) { launch_step("sde_replay", kReplay, s, queue); }

void sde_replay_backward(const StepArguments& s, const Queue& queue) { launch_step("sde_replay_backward", kReplayBackward, s, queue); }

void fill_philox(const NormalArguments& n, const Queue& queue) {
  const NormalLaunch launched = {n, divisor(tiles_of(n.size))};
  launch("fill_philox", fill_philox_kernel, launched, n.size > 0 ? n.batch * launched.tiles.by : 0, threads_of(n.size), queue);
}

std::string sde_step_why_not(int device) {
  const std::string why_not = load_kernels<NormalLaunch>(device, {{{fill_philox_kernel, fill_philox_kernel, fill_philox_kernel}}});
  return why_not.empty() ? load_kernels(device, {kDraw<0>, kDraw<3>, kReplay, kReplayBackward}) : why_not;
}
