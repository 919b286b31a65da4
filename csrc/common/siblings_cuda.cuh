// Samples that share a velocity row: a block takes a tile of a row, reads it once, and walks the samples of the row.
//
// Few samples it finds by looking through `row` 32 at a time: that costs no launch, no memory and no order of arrival. Many come
// sorted by their rows, and it walks its own alone. Either way in ascending order: the same sums.
#pragma once

#include "latent_cuda.cuh"
#include "sums_cuda.cuh"

struct Walk {
  const int64_t* row;            // (batch,) the velocity row of each sample; nullptr: sample b has row b
  const int64_t *order, *first;  // nullptr, or the samples sorted by their rows, and where a row's begin
  int64_t rows, batch;
  Divisor tiles;  // of a row
  int slices;     // a row's samples are dealt out to so many blocks
};

// Every sample has a row of its own: what a kernel for such calls knows.
FK_DEVICE void know_own_rows(Walk& walk) {
  walk.row = walk.order = walk.first = nullptr;
  walk.slices = 1;
}

// What a block takes.
struct RowTile {
  int64_t row, tile;
  int slice;
};

// backwards: the first blocks, which run first, take the last tiles, of which caches still hold what a kernel before has written.
FK_DEVICE RowTile row_tile_of_block(const Walk& walk, bool backwards = false) {
  const unsigned block = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x, part = quotient(block, walk.tiles);
  return {int64_t(part / unsigned(walk.slices)), int64_t(block - part * walk.tiles.by), int(part % unsigned(walk.slices))};
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

// A block's samples are among those at the places from begin to end: all samples in turn, or the row's own of a sorted list.
struct Places {
  int64_t begin, end;
};

// Sorted samples are dealt out to the slices in runs; others in turn, by sum_siblings.
FK_DEVICE Places places_of(const Walk& walk, const RowTile& at) {
  if (!walk.row) return {at.row, at.row + 1};
  if (!walk.order) return {0, walk.batch};
  const int64_t begin = walk.first[at.row], count = walk.first[at.row + 1] - begin;
  return {begin + count * at.slice / walk.slices, begin + count * (at.slice + 1) / walk.slices};
}

FK_DEVICE int64_t sample_at(const Walk& walk, int64_t place) { return walk.order ? walk.order[place] : place; }

FK_DEVICE bool is_member(const Walk& walk, int64_t row, int64_t place, const Places& places) {
  return place < places.end && (walk.order || row_of_sample(walk, place) == row);
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
  const Places places = places_of(walk, at);
  int rank = 0;
  Item upcoming = only;
  for (int64_t base = places.begin; base < places.end; base += kWarp) {
    const auto sample_of = [&](unsigned bits) { return sample_at(walk, base + __ffs(bits) - 1); };
    unsigned mine = __ballot_sync(kAllLanes, is_member(walk, at.row, base + lane_index(), places));
    if (!walk.order && walk.slices > 1) {
      unsigned all = mine;
      for (mine = 0; all; all &= all - 1, ++rank)
        if (rank % walk.slices == at.slice) mine |= lowest_bit(all);
    }
    if (walk.row && mine) upcoming = fetch(sample_of(mine));
    int place = 0;
    for (unsigned left = mine, after; left; left = after, ++place) {
      after = left & (left - 1);
      const Item item = upcoming;
      if (after) upcoming = fetch(sample_of(after));
      float sums[kSums] = {};
      term(sample_of(left), item, sums);
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
      const int64_t sample = sample_of(left);
      double totals[kSums];
      if (complete_sample(scratch, of_warp[place], sample, at.tile, walk.tiles.by, totals)) finish(sample, totals);
    }
    if (walk.row) __syncthreads();  // before the next samples' sums take the place of these
  }
}

// The same for a sample that has its row alone, from every thread's share of its sums.
template <int kSums, class Finish>
FK_DEVICE void sum_alone(const RowTile& at, const Walk& walk, const Scratch& scratch, unsigned used, const float (&sums)[kSums],
                         Finish finish) {
  double totals[kSums];
  if (sample_sums(scratch, used, sums, at.row, at.tile, walk.tiles.by, totals)) finish(at.row, totals);
}

// What a loss keeps in its scratch, beside the sums of tiles.
struct LossScratch {
  double* of_block;    // (blocks,) of kLossBlock samples
  float* sample_loss;  // (batch,)
  int* arrivals;       // (blocks + 1,)
  Scratch tiles;
};

// sample_loss: where else the losses of the samples go.
inline LossScratch loss_scratch(const Scratch& scratch, int64_t batch, int64_t tiles, int sums, float* sample_loss) {
  float* const partial = scratch.partial + 2 * loss_blocks(batch);
  float* const own = partial + batch * tiles * sums;
  return {
      reinterpret_cast<double*>(scratch.partial), sample_loss ? sample_loss : own, scratch.arrivals + batch, {partial, scratch.arrivals}};
}

// The whole warp, once for each sample: the last of a block adds up the block's losses in order, the last of all the blocks' sums.
FK_DEVICE void reduce_loss(const LossScratch& scratch, int64_t sample, int64_t batch, double share, float* loss) {
  const int64_t blocks = (batch + kLossBlock - 1) / kLossBlock, block = sample / kLossBlock, begin = block * kLossBlock;
  const int64_t count = batch - begin < kLossBlock ? batch - begin : kLossBlock;
  if (!last_to_arrive(scratch.arrivals + block, count)) return;
  double sum = sum_in_order(scratch.sample_loss + begin, count);
  if (blocks > 1) {
    if (lane_index() == 0) scratch.of_block[block] = sum;
    if (!last_to_arrive(scratch.arrivals + blocks, blocks)) return;
    sum = sum_in_order(scratch.of_block, blocks);
  }
  if (lane_index() == 0) *loss = float(sum * share);
}

// Enough blocks where there are samples to deal out.
template <class Arguments>
Walk walk_of(const Arguments& of, int64_t tiles) {
  const int64_t rows = of.rows, batch = of.batch;
  const int64_t all = rows * tiles > 0 ? rows * tiles : 1;
  const int64_t enough = (kEnoughBlocks + all - 1) / all, most = of.row && rows ? (batch + rows - 1) / rows : 1;
  const int64_t slices = enough < most ? enough : most;
  return {of.row, of.order, of.first, rows, batch, divisor(tiles), int(slices > 0 ? slices : 1)};
}
