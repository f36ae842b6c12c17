// verify_attention on tensor cores, for queries and caches of the same two-byte type.
//
// Four warps share a tile's 64 keys, 16 each, and every warp keeps sums over its own keys for all of the head's
// columns; they are merged once, at the end. So scores go from one product's registers to the next's, a warp copies,
// awaits and reads its own keys only, no barrier stands in the loop, and each key leaves shared memory once. (Splitting
// the columns instead would save registers, but pass every probability through shared memory, behind two barriers a
// tile.) Blocks of 64 rows have two such teams of four warps, which share the copies.
#pragma once

#include "cuda/attention_merge.cuh"
#include "cuda/attention_warp.cuh"
#include "cuda/reduce.cuh"

namespace pearl::cuda {

/// A block's teams of four warps have different rows; the compiler knows it if there is one.
template <int kTeams>
__device__ __forceinline__ int team_of_thread() {
  return kTeams == 1 ? 0 : threadIdx.x / (32 * kKeyWarps);
}

/// Where the warps of a block merge their sums: over the queries and the ring, once they are done with.
template <int kWidth, int kRowTiles, int kTeams>
struct MergeBuffer {
  static constexpr int kRows = 16 * kRowTiles * kTeams;
  static constexpr int kStride = kWidth + 8;  // rows g and g + 1 begin 8 banks apart: stores of pairs do not collide
  float peak[kKeyWarps][kRows], mass[kKeyWarps][kRows];
  float sum[kKeyWarps][16 * kTeams][kStride];  // one tile of rows of each team at a time
};

/// Adds up what the four warps of each team have and stores it. All threads take part.
template <class T, int kWidth, int kRowTiles, int kTeams>
__device__ __forceinline__ void merge_warps(const AttentionTask& task, const BlockRows& rows, int kv_head, int split,
                                            WarpSums<T, kWidth, kRowTiles>& sums,
                                            MergeBuffer<kWidth, kRowTiles, kTeams>& merge) {
  const int lane = threadIdx.x % 32, key_warp = threadIdx.x / 32 % kKeyWarps, team = team_of_thread<kTeams>();
#pragma unroll
  for (int i = 0; i < kRowTiles * 2; ++i) {
    const LaneRow& row = sums.rows[i / 2][i % 2];
    const float mass = group_sum<4>(row.mass);
    const int to = team * 16 * kRowTiles + i * 8 + lane / 4;
    if (lane % 4 == 0) merge.peak[key_warp][to] = row.peak;
    if (lane % 4 == 0) merge.mass[key_warp][to] = mass;
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kWidth / 8 * 2; ++j) {
      float* to = &merge.sum[key_warp][team * 16 + j % 2 * 8 + lane / 4][j / 2 * 8 + lane % 4 * 2];
      *reinterpret_cast<float2*>(to) = make_float2(sums.sum[i][j / 2][j % 2 * 2], sums.sum[i][j / 2][j % 2 * 2 + 1]);
    }
    __syncthreads();  // the sums below are other warps'
    for (int e = threadIdx.x; e < 16 * kTeams * kWidth / 4; e += 32 * kKeyWarps * kTeams) {
      const int from = e / (kWidth / 4), column = e % (kWidth / 4) * 4;
      const int row = (from / 16 * kRowTiles + i) * 16 + from % 16;
      if (row >= rows.count || column >= task.p.head_dim) continue;
      float peak = kLowest, mass = 0.0f, sum[4] = {};
      for (int w = 0; w < kKeyWarps; ++w) peak = fmaxf(peak, merge.peak[w][row]);
      for (int w = 0; w < kKeyWarps; ++w) {
        const float factor = exp2_fast(merge.peak[w][row] - peak);
        const float4 part = *reinterpret_cast<const float4*>(&merge.sum[w][from][column]);
        mass += merge.mass[w][row] * factor;
        sum[0] += part.x * factor;
        sum[1] += part.y * factor;
        sum[2] += part.z * factor;
        sum[3] += part.w * factor;
      }
      store_row(task, rows, row, kv_head, split, column, sum, peak, mass);
    }
    if (i + 1 < kRowTiles) __syncthreads();  // the next tile of rows is written over this one
  }
}

/// The block's queries, rows beyond its own and columns beyond the head's zero.
template <class T, int kWidth, int kRows, int kThreads>
__device__ __forceinline__ void load_queries(const AttentionTask& task, const BlockRows& rows, int kv_head, T* to) {
  const T* const q = static_cast<const T*>(task.p.q);
  if (!task.aligned_q) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kWidth; i += kThreads) {
      const int row = i / kWidth, column = i % kWidth;
      const bool live = row < rows.count && column < task.p.head_dim;
      to[tile_offset<T, kWidth>(row, column)] = live ? q[query_offset(task, rows, row, kv_head) + column] : T{};
    }
    return;
  }
  constexpr int kChunks = kWidth / 8, kCount = kRows * kChunks / kThreads;
  Pack<T, 8> chunks[kCount] = {};  // all are on their way before the first is waited for
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int index = i * kThreads + threadIdx.x, row = index / kChunks, column = index % kChunks * 8;
    if (row >= rows.count || column >= task.p.head_dim) continue;
    chunks[i] = load_pack<8, true>(q + query_offset(task, rows, row, kv_head) + column);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int index = i * kThreads + threadIdx.x;
    store_pack<true>(to + tile_offset<T, kWidth>(index / kChunks, index % kChunks * 8), chunks[i]);
  }
}

/// A tile that threads have each waited for becomes visible to all that share its keys, and all of them are done with
/// the tile before it, over which the next is copied.
template <int kTeams>
__device__ __forceinline__ void sync_sharers() {
  if constexpr (kTeams == 1) {
    __syncwarp();  // other lanes' copies have arrived; and this tile's predecessor, copied over next, is read no more
  } else {
    __syncthreads();  // the same of both teams
  }
}

/// Bytes of dynamic shared memory: of the queries, and of each stage of the ring.
template <class T, int kWidth, int kRowTiles, int kTeams>
constexpr int64_t kMmaQueryBytes = 16 * kRowTiles * kTeams * kWidth * sizeof(T);
template <class T, int kWidth>
constexpr int64_t kMmaStageBytes = 2 * kTileKeys * kWidth * sizeof(T);

/// Blocks that a multiprocessor is meant to run at a time. Two teams of warps fill its registers.
template <int kTeams>
constexpr int kMmaResident = kTeams == 1 ? 2 : 1;

/// The block's rows against one split of the keys: stores results, or partial ones. False if there is nothing to do.
/// `rows` become the block's.
template <class T, int kWidth, int kRowTiles, int kTeams>
__device__ __forceinline__ bool attend_mma_split(const AttentionTask& task, int split, unsigned char* shared,
                                                 BlockRows& rows) {
  constexpr int kThreads = 32 * kKeyWarps * kTeams, kRows = 16 * kRowTiles * kTeams, kTile = kTileKeys * kWidth;
  T* const queries = reinterpret_cast<T*>(shared);
  T* const ring = queries + kRows * kWidth;  // stages of a tile of keys and one of values

  const int kv_head = blockIdx.x % static_cast<int>(task.p.kv_heads);
  rows = block_rows_at<kRows>(task, blockIdx.x / static_cast<int>(task.p.kv_heads));
  if (rows.count <= 0) return false;
  const KeyRange keys = overlap(block_keys(task, rows), split_range(task, rows, split));
  if (keys.begin >= keys.end) return false;

  const int lane = threadIdx.x % 32, key_warp = threadIdx.x / 32 % kKeyWarps, team = team_of_thread<kTeams>();
  const PageReader pages(task, rows, keys);
  const int begin = keys.begin / kTileKeys * kTileKeys, first = key_warp * kWarpKeys, stages = task.stages;
  int page = pages.page(begin + first + lane % kWarpKeys);  // of the lane's key in the next tile to copy
  const auto copy_tile = [&](int tile, int stage) {
    T* const k = ring + stage * 2 * kTile + first * kWidth;
    if (tile < keys.end) {
      const int64_t offset = pages.slot(page, tile + first + lane % kWarpKeys) * task.slot_bytes;
      const KeyRange live = {keys.begin - tile - first, keys.end - tile - first};
      copy_rows<T, kWidth, kWarpKeys, 32 * kTeams>(task, kv_head, offset, live, team * 32 + lane, k, k + kTile);
    }
    cp_async_commit();
    page = pages.page(tile + kTileKeys + first + lane % kWarpKeys);  // its latency passes while a tile is computed with
  };
  for (int i = 0; i < stages - 1; ++i) copy_tile(begin + i * kTileKeys, i);

  load_queries<T, kWidth, kRows, kThreads>(task, rows, kv_head, queries);
  WarpSums<T, kWidth, kRowTiles> sums;
#pragma unroll
  for (int i = 0; i < kRowTiles * 2; ++i) {
    const int row = team * 16 * kRowTiles + i * 8 + lane / 4;
    sums.rows[i / 2][i % 2].position = row_position(task, rows, min(row, rows.count - 1));
  }
#pragma unroll
  for (int i = 0; i < kRowTiles * kWidth / 8 * 4; ++i) sums.sum[i / (kWidth / 2)][i / 4 % (kWidth / 8)][i % 4] = 0.0f;
  if constexpr (kTeams == 1) __syncthreads();  // queries are other warps'; the loop of two teams begins with a barrier

  int stage = 0;
  for (int tile = begin; tile < keys.end; tile += kTileKeys) {
    wait_for_tile(stages);
    sync_sharers<kTeams>();
    copy_tile(tile + (stages - 1) * kTileKeys, stage == 0 ? stages - 1 : stage - 1);  // over the tile before this one
    const T* k = ring + stage * 2 * kTile + first * kWidth;
    sums.attend(task, queries + team * 16 * kRowTiles * kWidth, k, k + kTile, tile + first);
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  // No copy is on its way: the last tile was the youngest that any thread copied.
  __syncthreads();  // sums are written over queries and keys that other warps may still read
  // The same rows again, from the cache: kept through the loop they would cost the registers that spills are made of.
  rows = block_rows_at<kRows>(task, blockIdx.x / static_cast<int>(task.p.kv_heads));
  merge_warps(task, rows, kv_head, split, sums, *reinterpret_cast<MergeBuffer<kWidth, kRowTiles, kTeams>*>(shared));
  return true;
}

/// Grid: {blocks of rows * kv_heads, splits, or groups of them if a block walks}. The heads of a page, which lie side
/// by side, are neighbours in the grid.
template <class T, int kWidth, int kRowTiles, int kTeams>
__global__ void __launch_bounds__(32 * kKeyWarps * kTeams, kMmaResident<kTeams>)
    attend_mma(const __grid_constant__ AttentionTask task) {
  PEARL_DYN_SMEM(unsigned char, shared);
  BlockRows rows;
  walk<32 * kKeyWarps * kTeams, 16 * kRowTiles * kTeams>(task, rows, reinterpret_cast<bool*>(shared), [&](int split) {
    return attend_mma_split<T, kWidth, kRowTiles, kTeams>(task, split, shared, rows);
  });
}

}  // namespace pearl::cuda
