// Sums of a sample in a fixed order: eight elements in a thread, threads of a warp as a tree, warps, then tiles in double.
#pragma once

#include "platform_cuda.cuh"

template <class T>
FK_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) value += __shfl_xor_sync(kAllLanes, value, lane);
  return value;
}

FK_DEVICE int lane_index() { return threadIdx.x % kWarp; }
FK_DEVICE int warp_index() { return threadIdx.x / kWarp; }

// The whole warp: the sums in double of `count` vectors of values. Each lane adds its own in order, but loads many ahead: the last
// tile of a sample waits for few loads in turn.
template <int kSums, class T>
FK_DEVICE void sums_in_order(const T* values, int64_t count, double (&totals)[kSums]) {
  constexpr int kAhead = 16 / kSums;
  double sums[kSums] = {};
  for (int64_t first = lane_index(); first < count; first += kAhead * kWarp) {
    T ahead[kAhead][kSums];
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int k = 0; k < kSums; ++k)  // L1 may be stale
        ahead[i][k] = first + i * kWarp < count ? __ldcg(values + (first + i * kWarp) * kSums + k) : T(0);
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int k = 0; k < kSums; ++k) sums[k] += double(ahead[i][k]);
  }
#pragma unroll
  for (int k = 0; k < kSums; ++k) totals[k] = warp_sum(sums[k]);
}

template <class T>
FK_DEVICE double sum_in_order(const T* values, int64_t count) {
  double totals[1];
  sums_in_order(values, count, totals);
  return totals[0];
}

// The whole warp: whether it is the last of `expected` to arrive. Then it sees what the others wrote, and has cleared the count.
FK_DEVICE bool last_to_arrive(int* arrivals, int64_t expected) {
  __syncwarp();  // what other lanes wrote goes with lane 0
  int before = 0;
  if (lane_index() == 0) before = arrive(arrivals);
  const bool last = __shfl_sync(kAllLanes, before, 0) == int(expected - 1);
  if (last && lane_index() == 0) *arrivals = 0;
  __syncwarp();
  return last;
}

constexpr int kWarpsAtMost = 8;

// The whole warp: adds the sums of a tile, given by warp, to those of its sample. True where that completes them: then totals are the
// sample's.
template <int kSums>
FK_DEVICE bool complete_sample(const Scratch& scratch, const float (&of_warp)[kSums][kWarpsAtMost], int64_t sample, int64_t tile,
                               int64_t tiles, double (&totals)[kSums]) {
  const int n = lane_index();
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarpsAtMost; ++w)
    if (n < kSums && w < int(blockDim.x) / kWarp) sum += of_warp[n][w];
  if (tiles == 1) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) totals[k] = double(__shfl_sync(kAllLanes, sum, k));
    return true;
  }
  float* partial = scratch.partial + sample * tiles * kSums;
  if (n < kSums) partial[tile * kSums + n] = sum;
  if (!last_to_arrive(scratch.arrivals + sample, tiles)) return false;
  sums_in_order(partial, tiles, totals);
  return true;
}

// The whole block: the sums of one sample, from every thread's share; those that no bit of `used` names are 0. True in one warp of the
// block that completes it: then totals are the sample's.
template <int kSums>
FK_DEVICE bool sample_sums(const Scratch& scratch, unsigned used, const float (&values)[kSums], int64_t sample, int64_t tile, int64_t tiles,
                           double (&totals)[kSums]) {
  __shared__ float of_warp[kSums][kWarpsAtMost];
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const float sum = used >> k & 1 ? warp_sum(values[k]) : 0.0f;
    if (lane_index() == 0) of_warp[k][warp_index()] = sum;
  }
  __syncthreads();
  return warp_index() == 0 && complete_sample(scratch, of_warp, sample, tile, tiles, totals);
}
