// Samples that share a velocity row: a block takes a tile of a row, reads it once, and walks the samples of the row.
//
// It finds them by looking through `row` 32 samples at a time: that costs no launch, no memory and no order of arrival.
#pragma once

#include "latent_cuda.cuh"
#include "sums_cuda.cuh"

struct Walk {
  const int64_t* row;  // (batch,) the velocity row of each sample; nullptr: sample b has row b
  int64_t rows, batch;
  int tiles;   // of a row
  int slices;  // a row's samples are dealt out to so many blocks
};

// What a block takes.
struct RowTile {
  int64_t row, tile;
  int slice;
};

FK_DEVICE RowTile row_tile_of_block(const Walk& walk) {
  const unsigned part = blockIdx.x / unsigned(walk.tiles);
  return {int64_t(part / unsigned(walk.slices)), int64_t(blockIdx.x % unsigned(walk.tiles)), int(part % unsigned(walk.slices))};
}

FK_DEVICE bool is_out_of_range(const Walk& walk, int64_t sample) {
  return walk.row && (walk.row[sample] < 0 || walk.row[sample] >= walk.rows);
}

// Out of range it is some row nevertheless: every sample has to arrive.
FK_DEVICE int64_t row_of_sample(const Walk& walk, int64_t sample) {
  if (!walk.row) return sample;
  const int64_t row = walk.row[sample];
  return row < 0 ? 0 : row < walk.rows ? row : walk.rows - 1;
}

FK_DEVICE bool is_member(const Walk& walk, int64_t row, int64_t sample) {
  return sample < walk.batch && row_of_sample(walk, sample) == row;
}

// Runs body(base) for every 32 samples, from base on, among which there may be samples of a row.
template <class Body>
FK_DEVICE void for_bases(const Walk& walk, int64_t row, Body body) {
  const int64_t begin = walk.row ? 0 : row / kWarp * kWarp, end = walk.row ? walk.batch : begin + 1;
  for (int64_t base = begin; base < end; base += kWarp) body(base);
}

FK_DEVICE unsigned lowest_bit(unsigned bits) { return bits & (0u - bits); }

// The whole block: sums over the samples of a row.
//   fetch(sample)               loads what a sample has of its own, while the sample before it is computed
//   term(sample, item, sums)    each thread's share of a sample's sums, of which the bits of `used` tell those that are not 0
//   finish(sample, totals)      by one warp of the block that completes the sample
// only: what fetch gives of the row's one sample, where `row` is absent: loaded together with the row.
template <int kSums, class Item, class Fetch, class Term, class Finish>
FK_DEVICE void sum_siblings(const Walk& walk, const RowTile& at, const Scratch& scratch, unsigned used, const Item& only, Fetch fetch,
                            Term term, Finish finish) {
  __shared__ float of_warp[kWarp][kSums][kWarpsAtMost];
  int rank = 0;
  Item upcoming = only;
  for_bases(walk, at.row, [&](int64_t base) {
    unsigned mine = 0;
    for (unsigned all = __ballot_sync(kAllLanes, is_member(walk, at.row, base + lane_index())); all; all &= all - 1, ++rank)
      if (rank % walk.slices == at.slice) mine |= lowest_bit(all);
    if (walk.row && mine) upcoming = fetch(base + __ffs(mine) - 1);
    int place = 0;
    for (unsigned left = mine, after; left; left = after, ++place) {
      after = left & (left - 1);
      const Item item = upcoming;
      if (after) upcoming = fetch(base + __ffs(after) - 1);
      float sums[kSums] = {};
      term(base + __ffs(left) - 1, item, sums);
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        const float sum = used >> k & 1 ? warp_sum(sums[k]) : 0.0f;
        if (lane_index() == 0) of_warp[place][k][warp_index()] = sum;
      }
    }
    __syncthreads();
    place = 0;
    for (unsigned left = mine; left; left &= left - 1, ++place) {
      if (place % (int(blockDim.x) / kWarp) != warp_index()) continue;
      const int64_t sample = base + __ffs(left) - 1;
      double totals[kSums];
      if (complete_sample(scratch, of_warp[place], sample, at.tile, walk.tiles, totals)) finish(sample, totals);
    }
    if (walk.row) __syncthreads();  // before the next samples' sums take the place of these
  });
}

// The whole warp, once for each sample: the last adds up the losses of all in order.
FK_DEVICE void reduce_loss(const Scratch& scratch, const float* sample_loss, int64_t batch, double share, float* loss) {
  if (!last_to_arrive(scratch.arrivals + batch, batch)) return;
  const double sum = sum_in_order(sample_loss, batch, 1);
  if (lane_index() == 0) *loss = float(sum * share);
}

// Enough blocks where there are samples to deal out.
inline Walk walk_of(const int64_t* row, int64_t rows, int64_t batch, int64_t tiles) {
  const int64_t all = rows * tiles > 0 ? rows * tiles : 1;
  const int64_t enough = (kEnoughBlocks + all - 1) / all, most = row && rows ? (batch + rows - 1) / rows : 1;
  const int64_t slices = enough < most ? enough : most;
  return {row, rows, batch, int(tiles), int(slices > 0 ? slices : 1)};
}
