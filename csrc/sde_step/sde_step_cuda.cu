// The step on CUDA: draw, replay, its gradient; one launch each. A block takes one tile of one sample, a thread eight elements.
#include "sde_step_cuda.h"

#include "../common/latent_cuda.cuh"
#include "../common/sums_cuda.cuh"
#include "sde_step.h"

namespace {

// What a launch adds to the arguments.
struct StepLaunch {
  StepArguments s;
  Scratch scratch;
  int tiles;     // of a sample
  bool vectors;  // whether latents allow 128-bit accesses
};
struct NormalLaunch {
  NormalArguments n;
  int tiles;
};

struct Tile {
  int64_t sample, index;
};

FK_DEVICE Tile tile_of_block(int tiles) { return {int64_t(blockIdx.x / unsigned(tiles)), int64_t(blockIdx.x % unsigned(tiles))}; }

FK_DEVICE StepRow row_of(const StepArguments& s, int64_t sample) {
  return *reinterpret_cast<const StepRow*>(s.rows + sample * s.row_stride);
}

// What a thread reads to know x_t and the velocity: all loads in flight before the first is used.
struct Inputs {
  Group x, velocity, uncond;
};

template <bool kWhole>
FK_DEVICE Inputs load_inputs(const StepArguments& s, const Place& at) {
  Inputs in = {load<kWhole>(s.x_t, at), load<kWhole>(s.velocity, at), {}};
  if (s.velocity_uncond.data) in.uncond = load<kWhole>(s.velocity_uncond, at);
  return in;
}

FK_DEVICE Floats velocity_of(const StepArguments& s, const Inputs& in) {
  Floats velocity = widen(in.velocity, s.velocity.dtype);
  if (s.velocity_uncond.data) {
    const Floats uncond = widen(in.uncond, s.velocity_uncond.dtype);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) velocity.v[i] = guided_velocity(velocity.v[i], uncond.v[i], s.guidance_scale);
  }
  return velocity;
}

FK_DEVICE Floats mean_of(const StepRow& row, const Floats& x, const Floats& velocity) {
  Floats mean;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) mean.v[i] = step_mean(row, x.v[i], velocity.v[i]);
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

FK_DEVICE void finish(const StepLaunch& launch, const Tile& tile, const StepRow& row, float sum) {
  const StepArguments& s = launch.s;
  double total;
  if (sample_sum(launch.scratch, sum, tile.sample, tile.index, launch.tiles, total))
    s.log_prob[tile.sample] = step_log_prob(row, total, s.size);
}

// Writes x_next (and x0) and returns the sum of squares of what is stored, after rounding, minus the mean.
template <bool kWhole, int kHistory>
FK_DEVICE float draw(const StepArguments& s, const StepRow& row, const Place& at) {
  const Inputs in = load_inputs<kWhole>(s, at);
  Group earlier[kHistory + 1], given = {};
#pragma unroll
  for (int j = 0; j < kHistory; ++j)
    if (j < s.num_history) earlier[j] = load<kWhole>(s.history[j], at);
  if (s.noise.data) given = load<kWhole>(s.noise, at);  // not only where std != 0: that would wait for the row
  Floats noise = {};
  if (s.key.sample_id) noise = normals(s.key, at.sample, at.first);

  const Floats x = widen(in.x, s.x_t.dtype), velocity = velocity_of(s, in);
  if (s.x0.data) {
    Floats x0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x0.v[i] = predicted_x0(row, x.v[i], velocity.v[i]);
    store<kWhole>(s.x0, at, narrow(x0, s.x0.dtype));
  }
  Floats mean = mean_of(row, x, velocity);
#pragma unroll
  for (int j = 0; j < kHistory; ++j) {
    if (j >= s.num_history) continue;
    const Floats values = widen(earlier[j], s.history[j].dtype);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) mean.v[i] += row.h[j] * values.v[i];
  }
  Floats next = mean;
  if (row.std != 0 && (s.noise.data || s.key.sample_id)) {
    if (s.noise.data) noise = widen(given, s.noise.dtype);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) next.v[i] = step_draw(row, mean.v[i], noise.v[i]);
  }
  const Group stored = narrow(next, s.x_next.dtype);
  store<kWhole>(s.x_next, at, stored);
  return sum_of_squares(widen(stored, s.x_next.dtype), mean, at.count);
}

template <bool kWhole>
FK_DEVICE float replay(const StepArguments& s, const StepRow& row, const Place& at) {
  const Inputs in = load_inputs<kWhole>(s, at);
  const Group next = load<kWhole>(s.x_next, at);
  const Floats mean = mean_of(row, widen(in.x, s.x_t.dtype), velocity_of(s, in));
  return sum_of_squares(widen(next, s.x_next.dtype), mean, at.count);
}

template <bool kWhole>
FK_DEVICE void replay_backward(const StepArguments& s, const StepRow& row, const Place& at) {
  const Inputs in = load_inputs<kWhole>(s, at);
  const Group stored = load<kWhole>(s.x_next, at);
  const float guidance = s.velocity_uncond.data ? s.guidance_scale : 1.0f;
  const float scale = s.grad_out[at.sample * s.grad_stride] * 2.0f * row.k * row.b * guidance / float(s.size);  // every thread: no doubles
  const Floats mean = mean_of(row, widen(in.x, s.x_t.dtype), velocity_of(s, in)), next = widen(stored, s.x_next.dtype);
  Floats slope;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) slope.v[i] = step_gradient(scale, next.v[i], mean.v[i]);
  store<kWhole>(s.grad, at, narrow(slope, s.grad.dtype));
}

// kHistory: how many earlier predictions there may be. Their registers would cost the plain draw half its threads.
template <int kHistory>
__global__ void __launch_bounds__(256) sde_draw_kernel(const __grid_constant__ StepLaunch launch) {
  const StepArguments& s = launch.s;
  const Tile tile = tile_of_block(launch.tiles);
  const StepRow row = row_of(s, tile.sample);
  const Place at = place_of_thread(tile.sample, tile.index, s.size);
  float sum = 0;
  if (launch.vectors && at.count == kGroup) sum = draw<true, kHistory>(s, row, at);
  else if (at.count > 0) sum = draw<false, kHistory>(s, row, at);
  if (s.log_prob) finish(launch, tile, row, sum);
}

__global__ void __launch_bounds__(256) sde_replay_kernel(const __grid_constant__ StepLaunch launch) {
  const StepArguments& s = launch.s;
  const Tile tile = tile_of_block(launch.tiles);
  const StepRow row = row_of(s, tile.sample);
  const Place at = place_of_thread(tile.sample, tile.index, s.size);
  float sum = 0;
  if (launch.vectors && at.count == kGroup) sum = replay<true>(s, row, at);
  else if (at.count > 0) sum = replay<false>(s, row, at);
  finish(launch, tile, row, sum);
}

__global__ void __launch_bounds__(256) sde_replay_backward_kernel(const __grid_constant__ StepLaunch launch) {
  const StepArguments& s = launch.s;
  const Tile tile = tile_of_block(launch.tiles);
  const StepRow row = row_of(s, tile.sample);
  const Place at = place_of_thread(tile.sample, tile.index, s.size);
  if (launch.vectors && at.count == kGroup) replay_backward<true>(s, row, at);
  else if (at.count > 0) replay_backward<false>(s, row, at);
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

void launch_step(const char* name, void (*kernel)(StepLaunch), const StepArguments& s, const Queue& queue) {
  StepLaunch launched = {s, queue.scratch, int(tiles_of(s.size)), true};
  for (const Latent* latent : {&s.x_t, &s.velocity, &s.velocity_uncond, &s.noise, &s.x_next, &s.x0, &s.history[0], &s.history[1],
                               &s.history[2], &s.grad})
    launched.vectors = launched.vectors && takes_vectors(*latent, s.batch);
  launch(name, kernel, launched, s.batch * launched.tiles, threads_of(s.size), queue);
}

}  // namespace

void sde_draw(const StepArguments& s, const Queue& queue) {
  launch_step("sde_draw", s.num_history ? sde_draw_kernel<3> : sde_draw_kernel<0>, s, queue);
}

void sde_replay(const StepArguments& s, const Queue& queue) { launch_step("sde_replay", sde_replay_kernel, s, queue); }

void sde_replay_backward(const StepArguments& s, const Queue& queue) {
  launch_step("sde_replay_backward", sde_replay_backward_kernel, s, queue);
}

void fill_philox(const NormalArguments& n, const Queue& queue) {
  const NormalLaunch launched = {n, int(tiles_of(n.size))};
  launch("fill_philox", fill_philox_kernel, launched, n.size > 0 ? n.batch * launched.tiles : 0, threads_of(n.size), queue);
}

std::string step_why_not(int device) {
  return load_kernels(device, {code(sde_draw_kernel<0>), code(sde_draw_kernel<3>), code(sde_replay_kernel),
                               code(sde_replay_backward_kernel), code(fill_philox_kernel)});
}
