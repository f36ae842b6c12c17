// What verify's kernels are told: the split of the rows, the workspace, and what is wanted of each row.
//
// Kernels run twice with the same code. Stage kTarget: slot = row of logits. Stage kDraft: slot = request, its row
// being the draft's distribution q at the request's rejected token, if there is one.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/logits_row.cuh"
#include "cuda/philox.cuh"
#include "cuda/tally.cuh"
#include "pearl/params.h"

namespace pearl::cuda {

enum class Stage { kTarget, kDraft };

// Statistics and draws: a block has a tile of the row. Tiles are what a row's sum is made of, so that their size must
// depend on nothing: neither on the batch nor on the dtype.
inline constexpr int kStatisticsThreads = 128, kStatisticsVectors = 4;
inline constexpr int kChunk = kStatisticsThreads * kStatisticsVectors * kVector, kTile = 2 * kChunk;
inline constexpr int kDrawThreads = 512, kDrawVectors = 2;
inline constexpr int kDrawTile = kDrawThreads * kVector;
// Cutoffs: sums of integers, whatever the split. Draws: the largest of numbers, likewise.
inline constexpr int kCutoffThreads = 512, kCutoffVectors = 4, kListed = 2048;
// Two blocks of either for each multiprocessor of a large GPU, as many as it runs at once: where few rows are cut, most
// blocks find nothing to do, and more of them would come in waves.
inline constexpr int64_t kResidentBlocks = 256;

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t tiles_of(int64_t vocab_size) { return ceil_div(vocab_size, kTile); }

/// Blocks that share a row when its cutoff is sought.
inline int64_t cutoff_splits(int64_t slots, int64_t vocab_size) {
  const int64_t most = ceil_div(vocab_size, kCutoffThreads * kVector);
  return std::min(most, ceil_div(kResidentBlocks, std::max<int64_t>(slots, 1)));
}

/// Tiles of a row that a block draws from.
inline int64_t draw_tiles_of(int64_t slots, int64_t vocab_size) {
  const int64_t tiles = ceil_div(vocab_size, kDrawTile);
  return ceil_div(tiles, std::min(tiles, ceil_div(kResidentBlocks, std::max<int64_t>(slots, 1))));
}

/// What a block found in its tile.
struct alignas(16) Tile {
  float largest;  // logit, -inf if there is none
  float sum;      // of exp(z), z relative to `largest`; or the score of `token`, relative to it too
  int32_t token;  // greedy: of the largest; draws: the winner; -1: none
  // Top-k: a value that k logits of the tile reach, and one that its share of k logits reach if all full tiles have an
  // equal share; infinite in a tile that is not full. -inf if too few threads have a logit to tell.
  float reached, reached_by_share;
};

/// A row's distribution, once it is known.
struct alignas(16) Summary {
  float peak;      // logit
  float cutoff;    // kept: z >= cutoff
  float log_mass;  // log of the sum of exp(z) over what is kept
  int32_t token;   // the row's own token, if it is greedy or has drawn one; -1 if it has none
};

enum Action : int32_t { kDone, kDrawBonus, kReplace };

/// The first row of a request that does not hold, and what is to be done about it.
struct Ruling {
  int32_t row;
  Action action;
};

/// A row's coarse bins, when several blocks fill them.
struct Histogram {
  Wide mass[kBins];
  uint32_t count[kBins];
};

struct Plan {
  VerifyParams p;
  bool logits_aligned, draft_aligned;
  int32_t vocab_size, rows, requests, slots;  // slots: of either stage
  int32_t tiles;                              // of a row's statistics
  int32_t draw_tiles, draw_blocks;            // tiles that a block draws from, blocks that share a row
  int32_t target_splits, draft_splits;        // of cutoffs
  Tile* tile;                                 // [slots, max(tiles, draw_blocks)]
  Histogram* histogram;                       // [slots of the stages whose rows are split]
  float* listed;                              // [slots, splits, kListed]: values z that a cutoff's block found, if few
  int32_t* listed_count;                      // [slots, splits]: how many it found
  Summary* target;                            // [rows]
  Summary* draft;                             // [requests]
  Ruling* ruling;                             // [requests]
  int32_t* request_of_row;                    // [rows], -1: none
  uint32_t* slot_counter;                     // [slots]
  uint32_t* request_counter;                  // [requests]
  int64_t workspace_bytes;
};

/// The plan of a call, and the bytes that it needs from `workspace` on.
inline Plan make_plan(const VerifyParams& p, void* workspace) {
  Plan plan = {};
  plan.p = p;
  plan.logits_aligned = rows_are_aligned(p.logits);
  plan.draft_aligned = rows_are_aligned(p.draft_logits);
  plan.vocab_size = static_cast<int32_t>(p.vocab_size);
  plan.rows = static_cast<int32_t>(p.logits.rows);
  plan.requests = static_cast<int32_t>(p.requests);
  plan.slots = std::max(plan.rows, plan.requests);
  plan.tiles = static_cast<int32_t>(tiles_of(p.vocab_size));
  plan.draw_tiles =
      static_cast<int32_t>(draw_tiles_of(p.rule == Rule::kCoupled ? plan.rows : plan.requests, p.vocab_size));
  plan.draw_blocks = static_cast<int32_t>(ceil_div(p.vocab_size, int64_t{plan.draw_tiles} * kDrawTile));
  plan.target_splits = static_cast<int32_t>(cutoff_splits(plan.rows, p.vocab_size));
  plan.draft_splits = static_cast<int32_t>(cutoff_splits(plan.requests, p.vocab_size));
  int64_t bytes = 0;
  const auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(reinterpret_cast<uintptr_t>(workspace) + bytes);
    bytes += ceil_div(count * static_cast<int64_t>(sizeof(*array)), 16) * 16;
  };
  take(plan.tile, int64_t{plan.slots} * std::max(plan.tiles, plan.draw_blocks));
  take(plan.histogram, std::max(plan.target_splits > 1 ? plan.rows : 0, plan.draft_splits > 1 ? plan.requests : 0));
  const int64_t parts = std::max(int64_t{plan.rows} * plan.target_splits, int64_t{plan.requests} * plan.draft_splits);
  take(plan.listed, parts * kListed);
  take(plan.listed_count, parts);
  take(plan.target, plan.rows);
  take(plan.draft, plan.requests);
  take(plan.ruling, plan.requests);
  take(plan.request_of_row, plan.rows);
  take(plan.slot_counter, plan.slots);
  take(plan.request_counter, plan.requests);
  plan.workspace_bytes = bytes;
  return plan;
}

}  // namespace pearl::cuda
