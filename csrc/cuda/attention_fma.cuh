// verify_attention in fp32 arithmetic: for fp32 caches, and for queries of another type than the cache's, which a
// tensor core could only take rounded.
//
// A block has 16 rows, and each of its four warps every fourth of them, so that decoding spreads over all warps. A lane
// has one of a tile's 32 keys for the scores and every 32nd group of columns for the sums; a row's probabilities pass
// through shared memory within its warp. 16 rows of 128 columns take about as long as an fp32 tile takes to arrive.
#pragma once

#include "cuda/attention_merge.cuh"
#include "cuda/attention_tiles.cuh"
#include "cuda/reduce.cuh"

namespace pearl::cuda {

inline constexpr int kFmaRows = 16, kFmaKeys = 32, kFmaWarps = 4, kOwnRows = kFmaRows / kFmaWarps;

/// Element `index` of q.
__device__ __forceinline__ float load_query(const AttentionParams& p, int64_t index) {
  switch (p.q_dtype) {
    case DType::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(p.q)[index]);
    case DType::kFloat16:
      return to_float(static_cast<const __half*>(p.q)[index]);
    default:
      return static_cast<const float*>(p.q)[index];
  }
}

/// One warp's rows, warp + 4 i of the block, and their sums.
template <class T, int kWidth>
struct FmaRows {
  static constexpr int kVector = kWidth / 32 < 4 ? kWidth / 32 : 4, kVectors = kWidth / (32 * kVector);

  int count;  // rows that the warp has, up to kOwnRows
  int position[kOwnRows];
  float peak[kOwnRows], mass[kOwnRows];    // as in attention_warp.cuh; mass of the lane's keys only
  float sum[kOwnRows][kVectors][kVector];  // columns (32 j + lane) * kVector and those after it

  /// Scores of the lane's key; q: the block's rows, fp32.
  __device__ __forceinline__ void score(const AttentionParams& p, const float* q, const T* k,
                                        float (&s)[kOwnRows]) const {
    constexpr int kChunk = 16 / sizeof(T);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) s[i] = 0.0f;
#pragma unroll 4
    for (int d = 0; d < kWidth; d += kChunk) {
      const Pack<T, kChunk> key = load_pack<kChunk, true>(k + tile_offset<T, kWidth>(lane, d));
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        if (i >= count) break;
        const float* query = q + (warp + kFmaWarps * i) * kWidth + d;
#pragma unroll
        for (int j = 0; j < kChunk; ++j) s[i] += query[j] * to_float(key.values[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) s[i] *= p.scale;
    if (p.softcap > 0.0f) {
      const float inverse = 1.0f / p.softcap;
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) s[i] = p.softcap * tanhf(s[i] * inverse);
    }
  }

  /// One step of the online softmax over a tile, whose first key is at position `key`. `pass`: the warp's
  /// probabilities, four rows' of each key.
  __device__ __forceinline__ void attend(const AttentionTask& task, const float* q, const T* k, const T* v, int key,
                                         float4* pass) {
    const int lane = threadIdx.x % 32;
    float s[kOwnRows];
    score(task.p, q, k, s);
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (i >= count) break;
      if (!sees(task, position[i], key + lane)) s[i] = -INFINITY;
      const float top = fmaxf(peak[i], group_max<32>(s[i]) * kLog2e), factor = exp2_fast(peak[i] - top);
      s[i] = exp2_fast(fmaf(s[i], kLog2e, -top));
      peak[i] = top;
      mass[i] = fmaf(mass[i], factor, s[i]);
#pragma unroll
      for (int j = 0; j < kVectors * kVector; ++j) sum[i][j / kVector][j % kVector] *= factor;
    }
    pass[lane] = make_float4(s[0], s[1], s[2], s[3]);
    __syncwarp();  // all lanes' probabilities are added up by each
    add_values(v, pass);
  }

  /// Stores what the rows have, through the place of their own queries: a lane then has four columns at a time.
  __device__ __forceinline__ void store(const AttentionTask& task, const BlockRows& rows, int kv_head, int split,
                                        float* queries, float4* pass) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncwarp();  // other lanes may still read the last probabilities, and queries of the warp's rows
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      if (i >= count) break;
      const float total = group_sum<32>(mass[i]);
      if (lane == 0) pass[i] = make_float4(peak[i], total, 0.0f, 0.0f);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        store_as(queries + (warp + kFmaWarps * i) * kWidth + (32 * j + lane) * kVector, sum[i][j]);
      }
    }
    __syncwarp();  // columns and masses below are other lanes'
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const int row = warp + kFmaWarps * i;
#pragma unroll 1
      for (int column = 4 * lane; column < task.p.head_dim; column += 128) {
        const float4 four = *reinterpret_cast<const float4*>(queries + row * kWidth + column);
        float columns[4] = {four.x, four.y, four.z, four.w};
        store_row(task, rows, row, kv_head, split, column, columns, pass[i].x, pass[i].y);
      }
    }
  }

 private:
  __device__ __forceinline__ void add_values(const T* v, const float4* pass) {
    const int lane = threadIdx.x % 32;
#pragma unroll 4
    for (int key = 0; key < kFmaKeys; ++key) {
      const float4 four = pass[key];
      const float probability[kOwnRows] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        const T* from = v + tile_offset<T, kWidth>(key, (32 * j + lane) * kVector);
        const Pack<T, kVector> value = load_pack<kVector, true>(from);
#pragma unroll
        for (int i = 0; i < kOwnRows; ++i) {
          if (i >= count) break;
#pragma unroll
          for (int e = 0; e < kVector; ++e) sum[i][j][e] += probability[i] * to_float(value.values[e]);
        }
      }
    }
  }
};

/// Bytes of dynamic shared memory beside the ring: queries, and the probabilities on their way.
template <int kWidth>
constexpr int64_t kFmaOtherBytes = kFmaRows * kWidth * sizeof(float) + kFmaWarps * kFmaKeys * sizeof(float4);
template <class T, int kWidth>
constexpr int64_t kFmaStageBytes = 2 * kFmaKeys * kWidth * sizeof(T);

inline constexpr int kFmaResident = 2;  // blocks that a multiprocessor is meant to run at a time

/// As attend_mma_split.
template <class T, int kWidth>
__device__ __forceinline__ bool attend_fma_split(const AttentionTask& task, int split, float* shared, BlockRows& rows) {
  constexpr int kThreads = 32 * kFmaWarps, kTile = kFmaKeys * kWidth;
  float* const queries = shared;
  float4* const passes = reinterpret_cast<float4*>(queries + kFmaRows * kWidth);
  T* const ring = reinterpret_cast<T*>(passes + kThreads);

  const int kv_head = blockIdx.x % static_cast<int>(task.p.kv_heads);
  rows = block_rows_at<kFmaRows>(task, blockIdx.x / static_cast<int>(task.p.kv_heads));
  if (rows.count <= 0) return false;
  const KeyRange keys = overlap(block_keys(task, rows), split_range(task, rows, split));
  if (keys.begin >= keys.end) return false;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, stages = task.stages;
  for (int i = threadIdx.x; i < kFmaRows * kWidth; i += kThreads) {
    const int row = i / kWidth, column = i % kWidth;
    const bool live = row < rows.count && column < task.p.head_dim;
    queries[i] = live ? load_query(task.p, query_offset(task, rows, row, kv_head) + column) : 0.0f;
  }
  FmaRows<T, kWidth> own;
  own.count = (rows.count - warp + kFmaWarps - 1) / kFmaWarps;
#pragma unroll
  for (int i = 0; i < kOwnRows; ++i) {
    own.position[i] = row_position(task, rows, min(warp + kFmaWarps * i, rows.count - 1));
    own.peak[i] = kLowest;
    own.mass[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < own.kVectors * own.kVector; ++j) own.sum[i][j / own.kVector][j % own.kVector] = 0.0f;
  }

  const PageReader pages(task, rows, keys);
  const int begin = keys.begin / kFmaKeys * kFmaKeys;
  int page = pages.page(begin + lane);  // of the lane's key in the next tile to copy
  const auto copy_tile = [&](int tile, int stage) {
    T* const k = ring + stage * 2 * kTile;
    if (tile < keys.end) {
      const int64_t offset = pages.slot(page, tile + lane) * task.slot_bytes;
      copy_rows<T, kWidth, kFmaKeys, kThreads>(task, kv_head, offset, {keys.begin - tile, keys.end - tile}, threadIdx.x,
                                               k, k + kTile);
    }
    cp_async_commit();
    page = pages.page(tile + kFmaKeys + lane);  // its latency passes while a tile is computed with
  };
  for (int i = 0; i < stages - 1; ++i) copy_tile(begin + i * kFmaKeys, i);

  int stage = 0;
  for (int tile = begin; tile < keys.end; tile += kFmaKeys) {
    wait_for_tile(stages);
    // This tile, and at first the queries, are other threads' copies; the tile before it, over which the next is
    // copied, and the warp's probabilities may still be read.
    __syncthreads();
    copy_tile(tile + (stages - 1) * kFmaKeys, stage == 0 ? stages - 1 : stage - 1);  // over the tile before this one
    const T* k = ring + stage * 2 * kTile;
    own.attend(task, queries, k, k + kTile, tile, passes + warp * kFmaKeys);
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  own.store(task, rows, kv_head, split, queries, passes + warp * kFmaKeys);
  return true;
}

/// Grid as attend_mma's.
template <class T, int kWidth>
__global__ void __launch_bounds__(32 * kFmaWarps, kFmaResident) attend_fma(const __grid_constant__ AttentionTask task) {
  PEARL_DYN_SMEM(float, shared);
  BlockRows rows;
  walk<32 * kFmaWarps, kFmaRows>(task, rows, reinterpret_cast<bool*>(shared),
                                 [&](int split) { return attend_fma_split<T, kWidth>(task, split, shared, rows); });
}

}  // namespace pearl::cuda
