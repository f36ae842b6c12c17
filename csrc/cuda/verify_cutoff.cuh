// Second pass, over rows that top-k, top-p or min-p cut: the cutoff, without sorting, and the mass of what is kept.
//
// The statistics tell a floor that the cutoff cannot be below; what is above it, usually few tokens, is spread over
// coarse bins, and listed, by all blocks of the row. The last of them to finish finds the bin where the wanted count or
// mass is reached, gathers that bin's values and continues among them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/block.cuh"
#include "cuda/tally.cuh"
#include "cuda/verify_decide.cuh"
#include "cuda/verify_search.cuh"
#include "cuda/verify_task.cuh"

namespace pearl::cuda {

/// By one warp; every lane gets the result.
__device__ inline RowStatistics merge_tiles(const Plan& plan, const Task& task, const Tile* tiles) {
  const int lane = threadIdx.x % kWarpLanes;
  RowStatistics row = {kMinusInfinity, 0.0f, kMinusInfinity, -1};
  float reached = kMinusInfinity, by_share = kInfinity;
  for (int i = lane; i < plan.tiles; i += kWarpLanes) {
    row.peak = fmaxf(row.peak, tiles[i].largest);
    reached = fmaxf(reached, tiles[i].reached);
    by_share = fminf(by_share, tiles[i].reached_by_share);
  }
  row.peak = warp_reduce(row.peak, Larger());
  reached = warp_reduce(reached, Larger());
  by_share = warp_reduce(by_share, Smaller());
  const Distribution d = make_distribution(task.temperature, row.peak);
  const auto scaled = [&](float logit) { return logit > kMinusInfinity ? d.scaled(logit) : kMinusInfinity; };
  Wide winner = 0;
  for (int i = lane; i < plan.tiles; i += kWarpLanes) {
    const float z = scaled(tiles[i].largest);
    if (tiles[i].token < 0) {
      row.sum = fmaf(tiles[i].sum, expf(z), row.sum);
    } else {
      const float score = task.greedy ? tiles[i].largest : tiles[i].sum + z;
      if (task.greedy || score > kMinusInfinity) winner = Larger()(winner, pack_token(score, tiles[i].token));
    }
  }
  row.sum = warp_reduce(row.sum, Sum());
  row.token = token_of(warp_reduce(winner, Larger()));
  if (task.top_k > 0) {
    row.floor = scaled(by_share < kInfinity ? fmaxf(reached, by_share) : reached);
  } else {
    if (task.top_p < 1.0f - 1e-5f) {  // fewer than vocab_size tokens are below it, half of what may be cut in all
      row.floor = logf(0.5f * (1.0f - task.top_p) * row.sum / static_cast<float>(plan.vocab_size));
    }
    if (task.min_p > 0.0f) row.floor = fmaxf(row.floor, logf(task.min_p));
  }
  return row;
}

/// Spreads the block's part of the row over the coarse bins, and lists it as long as there is room.
__device__ inline void spread(const Plan& plan, CutoffShared& shared) {
  for (int bin = threadIdx.x; bin < kBins; bin += kCutoffThreads) {
    shared.mass.set(bin, 0);
    shared.count[bin] = 0;
  }
  if (threadIdx.x == 0) shared.listed_count = 0;
  __syncthreads();  // bins and count are zero before another thread adds to them
  const int length = static_cast<int>(ceil_div(shared.task.row.size, int64_t{gridDim.x} * kVector)) * kVector;
  const int begin = static_cast<int>(blockIdx.x) * length;
  const bool counts = shared.task.top_k > 0;
  float* const list = plan.listed + part_of(blockIdx.x) * kListed;
  volatile int* const listed_count = &shared.listed_count;  // an old value costs an addition, no more
  for_each_scaled<kCutoffVectors>(shared.task.row, shared.z, begin, begin + length, shared.row.floor, [&](float z) {
    const int bin = coarse_bin(key_of(z));
    shared.mass.add(bin, mass_of(z));
    if (counts) atomicAdd(&shared.count[bin], 1u);
    if (*listed_count > kListed) return;
    const int at = atomicAdd(&shared.listed_count, 1);
    if (at < kListed) list[at] = z;
  });
  __syncthreads();  // all has been added before bins and count are read
  if (threadIdx.x == 0) plan.listed_count[part_of(blockIdx.x)] = shared.listed_count;
}

/// Adds the block's bins to the row's. True for the row's last block, which then has them all.
__device__ inline bool merge_bins(const Plan& plan, int slot, CutoffShared& shared) {
  Histogram& row = plan.histogram[slot];
  for (int bin = threadIdx.x; bin < kBins; bin += kCutoffThreads) {
    if (shared.mass.at(bin) != 0) atomicAdd(&row.mass[bin], shared.mass.at(bin));
    if (shared.count[bin] != 0) atomicAdd(&row.count[bin], shared.count[bin]);
  }
  if (!last_to_arrive(&plan.slot_counter[slot], gridDim.x, &shared.last)) return false;
  for (int bin = threadIdx.x; bin < kBins; bin += kCutoffThreads) {
    shared.mass.set(bin, __ldcg(&row.mass[bin]));
    shared.count[bin] = __ldcg(&row.count[bin]);
  }
  __syncthreads();  // the row's bins are there before another thread reads them
  return true;
}

/// Grid: (splits, slots). Rows without a cut are the first block's. Under the rejection rule a request is decided here.
__global__ void __launch_bounds__(kCutoffThreads, 2) verify_cutoff(const Plan plan, const Stage stage) {
  __shared__ CutoffShared shared;
  const int slot = blockIdx.y;
  if (threadIdx.x < kWarpLanes) {
    const Task task = task_of(plan, stage, slot);
    const bool leaves = task.request < 0 || (!task.is_cut() && blockIdx.x != 0);
    RowStatistics row = {};
    if (!leaves) row = merge_tiles(plan, task, plan.tile + static_cast<int64_t>(slot) * plan.tiles);
    if (threadIdx.x == 0) {
      shared.leaves = leaves;
      shared.task = task;
      shared.row = row;
      shared.z = make_distribution(task.temperature, row.peak);
    }
  }
  __syncthreads();  // the first warp has written what all read
  if (shared.leaves) return;
  Summary summary = {shared.row.peak, kMinusInfinity, logf(shared.row.sum), shared.row.token};
  if (shared.task.is_cut()) {
    spread(plan, shared);
    if (gridDim.x > 1 && !merge_bins(plan, slot, shared)) return;
    summary = resolve(plan, shared);
  }
  if (threadIdx.x == 0) (stage == Stage::kTarget ? plan.target : plan.draft)[slot] = summary;
  if (stage == Stage::kTarget && plan.p.rule == Rule::kRejection) finish_row(plan, shared.task.request, &shared.last);
}

}  // namespace pearl::cuda
