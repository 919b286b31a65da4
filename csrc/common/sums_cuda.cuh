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

// The whole warp: the sum in double of count values that lie `stride` apart.
template <class T>
FK_DEVICE double sum_in_order(const T* values, int64_t count, int64_t stride) {
  double sum = 0;
  for (int64_t i = lane_index(); i < count; i += kWarp) sum += double(__ldcg(values + i * stride));  // L1 may be stale
  return warp_sum(sum);
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
  for (int w = 0; n < kSums && w < int(blockDim.x) / kWarp; ++w) sum += of_warp[n][w];
  if (tiles == 1) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) totals[k] = double(__shfl_sync(kAllLanes, sum, k));
    return true;
  }
  float* partial = scratch.partial + sample * tiles * kSums;
  if (n < kSums) partial[tile * kSums + n] = sum;
  if (!last_to_arrive(scratch.arrivals + sample, tiles)) return false;
#pragma unroll
  for (int k = 0; k < kSums; ++k) totals[k] = sum_in_order(partial + k, tiles, kSums);
  return true;
}

// The whole block: the sum of one sample, from every thread's share. True in one thread of the block that completes it.
FK_DEVICE bool sample_sum(const Scratch& scratch, float value, int64_t sample, int64_t tile, int64_t tiles, double& total) {
  __shared__ float of_warp[1][kWarpsAtMost];
  value = warp_sum(value);
  if (lane_index() == 0) of_warp[0][warp_index()] = value;
  __syncthreads();
  double totals[1];
  if (warp_index() != 0 || !complete_sample(scratch, of_warp, sample, tile, tiles, totals)) return false;
  total = totals[0];
  return lane_index() == 0;
}
