// First pass over a row: its largest logit, the sum of exp(z), and where they follow from no more than that, the greedy
// token or the drawn one. Each block leaves what it found in its tile; the next kernel merges the tiles.
#pragma once

#include <cuda_runtime.h>

#include "cuda/block.cuh"
#include "cuda/philox.cuh"
#include "cuda/ptx.cuh"
#include "cuda/verify_task.cuh"

namespace pearl::cuda {

inline constexpr float kLog2E = 1.44269504f;

struct StatisticsShared {
  float floats[kStatisticsThreads / kWarpLanes];
  int ints[kStatisticsThreads / kWarpLanes];
  Wide wides[kStatisticsThreads / kWarpLanes];
  int request;
  Task task;
};

using ChunkLogits = float[kStatisticsVectors][kVector];

/// Counters start at zero, and requests without rows get their answer here: no block will come past them.
__device__ inline void prepare(const Plan& plan, int row) {
  const int first = row * kStatisticsThreads + static_cast<int>(threadIdx.x), step = plan.rows * kStatisticsThreads;
#pragma unroll 1
  for (int i = first; i < plan.slots; i += step) plan.slot_counter[i] = 0;
#pragma unroll 1
  for (int i = first; i < plan.requests; i += step) {
    plan.request_counter[i] = 0;
    plan.ruling[i] = {-1, kDone};
    plan.p.accepted[i] = 0;
    plan.p.next_token[i] = -1;
  }
}

/// The request that has this row, or -1.
__device__ inline int find_request(const Plan& plan, int row, int* shared) {
  if (threadIdx.x == 0) *shared = -1;
  __syncthreads();  // it is -1 before the thread that finds the request writes it
#pragma unroll 1
  for (int r = threadIdx.x; r < plan.requests; r += kStatisticsThreads) {
    if (plan.p.row_start[r] <= row && row < plan.p.row_start[r + 1]) *shared = r;
  }
  __syncthreads();  // it is found before it is read
  return *shared;
}

/// A value that at least k of the block's threads reach, as large as 16 bits can tell; -inf if there are fewer threads.
/// Each thread has another token, so that k tokens reach it too: the k-th largest logit is no smaller.
__device__ inline float reached_by(int k, float value) {
  const uint32_t bits = ordered_bits(value);
  uint32_t reached = 0;
  for (uint32_t bit = 0x80000000u; bit >= 0x10000u; bit >>= 1) {
    const int count = __syncthreads_count(bits >= (reached | bit));  // a vote, no memory is involved
    if (count >= k) reached |= bit;
  }
  return reached <= ordered_bits(kMinusInfinity) ? kMinusInfinity : float_of_ordered(reached);
}

/// The largest of a thread's logits so far, and the sum of exp((x - largest) / temperature) over them.
struct Running {
  float largest = kMinusInfinity, sum = 0.0f;

  /// scale = log2(e) / temperature. Without `sums` only the largest is kept.
  __device__ void add(const ChunkLogits& x, float scale, bool sums) {
    float top = x[0][0];
#pragma unroll
    for (int i = 1; i < kStatisticsVectors * kVector; ++i) top = fmaxf(top, x[i / kVector][i % kVector]);
    if (top > largest) {
      sum *= exp2_fast((largest - top) * scale);
      largest = top;
    }
    if (!sums || !(largest > kMinusInfinity)) return;
    const float offset = largest * scale;
    float added = 0.0f;
#pragma unroll
    for (int i = 0; i < kStatisticsVectors * kVector; ++i) {
      const float z = fmaf(x[i / kVector][i % kVector], scale, -offset);
      added += exp2_fast(fmaxf(z, kMinusInfinity));  // NaN is no token
    }
    sum = fmaf(added, exp2_fast(-fmaf(largest, scale, -offset)), sum);  // the offset's rounding is common to all terms
  }
};

/// The first token with the tile's largest logit. Only threads that have one read their logits again.
__device__ inline int first_of(const LogitsRow& row, int begin, float largest, float own, int* scratch) {
  int token = INT32_MAX;
#pragma unroll 1
  for (int first = begin + static_cast<int>(threadIdx.x) * kVector; own == largest && first < begin + kTile;
       first += kStatisticsThreads * kVector) {
    float x[1][kVector];
    load(row, first, 0, x);
#pragma unroll
    for (int e = kVector - 1; e >= 0; --e) token = x[0][e] == largest ? min(token, first + e) : token;
  }
  token = block_reduce<kStatisticsThreads>(token, scratch, Smaller());
  return token == INT32_MAX ? -1 : token;
}

/// Draws from the tile, with scores relative to the largest logit's.
__device__ inline Wide draw_from_tile(const Plan& plan, const Task& task, int row, int begin, float largest,
                                      Wide* scratch) {
  const Distribution d = make_distribution(task.temperature, largest);
  const NoiseKey key = noise_key(plan, task.request, row, kSampleStream);
  Race race(kSmallestNoise);  // the largest logit reaches more
#pragma unroll 1
  for (int from = begin; from < begin + kTile; from += kStatisticsThreads * kVector) {
    const int first = from + static_cast<int>(threadIdx.x) * kVector;
    float x[1][kVector];
    load(task.row, first, 0, x);  // again: from the cache, and in a loop that stays small
#pragma unroll
    for (int e = 0; e < kVector; e += 4) {
      const float z[4] = {d.scaled(x[0][e]), d.scaled(x[0][e + 1]), d.scaled(x[0][e + 2]), d.scaled(x[0][e + 3])};
      race.enter(key, first + e, z, [&](int j) { return z[j]; });
    }
  }
  return block_reduce<kStatisticsThreads>(race.packed(), scratch, Larger());
}

/// The cutoff's kernel adds to the row's bins; all blocks of the row clear them.
__device__ inline void clear_histogram(Histogram* histogram) {
  uint4* words = reinterpret_cast<uint4*>(histogram);
  constexpr int kWords = sizeof(Histogram) / sizeof(uint4);
#pragma unroll 1
  for (int i = blockIdx.x * kStatisticsThreads + threadIdx.x; i < kWords; i += gridDim.x * kStatisticsThreads) {
    words[i] = make_uint4(0, 0, 0, 0);
  }
}

/// Grid: (tiles, slots).
template <Stage kStage>
__global__ void __launch_bounds__(kStatisticsThreads, 8) verify_statistics(const Plan plan) {
  __shared__ StatisticsShared shared;
  const int slot = blockIdx.y, begin = blockIdx.x * kTile;
  if (kStage == Stage::kTarget) {
    prefetch(target_row(plan, slot), begin, kTile, kStatisticsThreads);  // while the request is found
    const int request = find_request(plan, slot, &shared.request);
    if (blockIdx.x == 0) prepare(plan, slot);
    if (blockIdx.x == 0 && threadIdx.x == 0) plan.request_of_row[slot] = request;
    if (threadIdx.x == 0) shared.task = target_task(plan, slot, request);
  } else if (threadIdx.x == 0) {
    shared.task = draft_task(plan, slot);
  }
  __syncthreads();  // the first thread has written the task that all read
  const Task& task = shared.task;
  if (task.request < 0) return;
  if (task.is_cut() && (kStage == Stage::kTarget ? plan.target_splits : plan.draft_splits) > 1) {
    clear_histogram(&plan.histogram[slot]);
  }

  const float scale = kLog2E / task.temperature;
  const bool races = task.draws && !task.is_cut(), sums = !task.greedy && !races;
  Running own;
#pragma unroll 1
  for (int chunk = begin; chunk < begin + kTile; chunk += kChunk) {
    ChunkLogits x;
    load(task.row, chunk + static_cast<int>(threadIdx.x) * kVector, kStatisticsThreads * kVector, x);
    own.add(x, scale, sums);
  }
  const float largest = block_reduce<kStatisticsThreads>(own.largest, shared.floats, Larger());
  Tile tile = {largest, 0.0f, -1, kMinusInfinity, kMinusInfinity};
  if (task.greedy) {
    tile.token = first_of(task.row, begin, tile.largest, own.largest, shared.ints);
  } else if (races) {
    const Wide winner = draw_from_tile(plan, task, slot, begin, tile.largest, shared.wides);
    tile.token = token_of(winner);
    if (winner != 0) tile.sum = float_of_ordered(static_cast<uint32_t>(winner >> 32));
  } else {
    const float sum = own.sum > 0.0f ? own.sum * exp2_fast((own.largest - tile.largest) * scale) : 0.0f;
    tile.sum = block_reduce<kStatisticsThreads>(sum, shared.floats, Sum());
    if (task.top_k > 0) {
      const int full_tiles = plan.vocab_size / kTile;
      const int share = full_tiles > 0 ? (task.top_k - 1) / full_tiles + 1 : task.top_k;
      tile.reached = reached_by(task.top_k, own.largest);
      tile.reached_by_share = begin + kTile <= plan.vocab_size ? reached_by(share, own.largest) : kInfinity;
    }
  }
  if (threadIdx.x == 0) plan.tile[static_cast<int64_t>(slot) * plan.tiles + blockIdx.x] = tile;
}

}  // namespace pearl::cuda
