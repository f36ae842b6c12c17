// A warp's part of verify_attention on tensor cores: its rows against 16 keys at a time, scores, softmax and sums in
// registers.
//
// Exactness. Scores, softmax and sums are fp32. Probabilities are fed to the tensor cores as the sum of two numbers of
// the cache's type: rounded once they would have a relative error of 2^-9 (bf16), so they have 2^-18. A tile of 64 keys
// and 128 columns is 32 KiB, which an H100's share of the memory's bandwidth takes 2300 cycles to bring to a
// multiprocessor; the products of 16 rows, the additional third included, take its tensor cores 300.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace pearl::cuda {

inline constexpr int kKeyWarps = 4, kWarpKeys = kTileKeys / kKeyWarps;
static_assert(kWarpKeys == 16, "the inner dimension of a tensor core product");

__device__ __forceinline__ __nv_bfloat162 round_pair(float x, float y, __nv_bfloat16) {
  return __floats2bfloat162_rn(x, y);
}
__device__ __forceinline__ __half2 round_pair(float x, float y, __half) { return __floats2half2_rn(x, y); }
__device__ __forceinline__ float2 widen_pair(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ __forceinline__ float2 widen_pair(__half2 pair) { return __half22float2(pair); }

/// Two values as T, the first in the lower half of `high`, and in `low` what rounding took from them.
template <class T>
__device__ __forceinline__ void split_pair(float x, float y, uint32_t& high, uint32_t& low) {
  const auto rounded = round_pair(x, y, T());
  const float2 back = widen_pair(rounded);
  const auto rest = round_pair(x - back.x, y - back.y, T());
  static_assert(sizeof(rounded) == sizeof(high), "a pair is a register");
  memcpy(&high, &rounded, sizeof(high));
  memcpy(&low, &rest, sizeof(low));
}

/// A row as one lane sees it: four lanes share it, each with its own columns.
struct LaneRow {
  float peak = kLowest;  // of the warp's scores so far, times log2(e)
  float mass = 0.0f;     // of the lane's probabilities, relative to 2^peak
  int position;
};

/// A lane's scores of 16 rows against 16 keys. First index: keys 0-7, keys 8-15. Second: keys 2 (lane % 4) and the next
/// of row lane / 4, then of row lane / 4 + 8. Later probabilities.
using Scores = float[2][4];

/// The scores of one of a lane's two rows turned into probabilities; returns what scales its earlier sums. `key` is the
/// position of the lane's first.
__device__ __forceinline__ float softmax_row(const AttentionTask& task, LaneRow& row, Scores& s, int half, int key) {
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float& score = s[i / 2][2 * half + i % 2];
    if (!sees(task, row.position, key + i / 2 * 8 + i % 2)) score = -INFINITY;
    top = fmaxf(top, score);
  }
  const float peak = fmaxf(row.peak, group_max<4>(top) * kLog2e), factor = exp2_fast(row.peak - peak);
  float mass = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float& score = s[i / 2][2 * half + i % 2];
    score = exp2_fast(fmaf(score, kLog2e, -peak));
    mass += score;
  }
  row.peak = peak;
  row.mass = fmaf(row.mass, factor, mass);
  return factor;
}

/// One warp's rows and sums.
template <class T, int kWidth, int kRowTiles>
struct WarpSums {
  LaneRow rows[kRowTiles][2];  // rows lane / 4 and lane / 4 + 8 of each tile of 16
  float sum[kRowTiles][kWidth / 8]
           [4];  // [][j]: columns 8 j + 2 (lane % 4) and the next of the one row, then of the other

  /// s = Q K^T over the warp's 16 keys, scaled and capped. q: the warp's rows.
  __device__ __forceinline__ void score(const AttentionParams& p, const T* q, const T* k,
                                        Scores (&s)[kRowTiles]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRowTiles * 8; ++i) s[i / 8][i / 4 % 2][i % 4] = 0.0f;
#pragma unroll
    for (int d = 0; d < kWidth; d += 16) {
      uint32_t keys[4];  // columns d to d + 7 and d + 8 to d + 15 of keys 0-7, then of keys 8-15
      ldmatrix_x4(keys, k + tile_offset<T, kWidth>(lane % 8 + lane / 16 * 8, d + lane / 8 % 2 * 8));
      const uint32_t first[2] = {keys[0], keys[1]}, second[2] = {keys[2], keys[3]};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t queries[4];
        ldmatrix_x4(queries, q + tile_offset<T, kWidth>(16 * i + lane % 16, d + lane / 16 * 8));
        mma_m16n8k16<T>(s[i][0], queries, first);
        mma_m16n8k16<T>(s[i][1], queries, second);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles * 8; ++i) s[i / 8][i / 4 % 2][i % 4] *= p.scale;
    if (p.softcap > 0.0f) {
      const float inverse = 1.0f / p.softcap;
#pragma unroll
      for (int i = 0; i < kRowTiles * 8; ++i) {
        float& score = s[i / 8][i / 4 % 2][i % 4];
        score = p.softcap * tanhf(score * inverse);
      }
    }
  }

  /// sum += P V. A tile of probabilities leaves one product in the layout in which the next wants it.
  __device__ __forceinline__ void add_values(const T* v, const Scores (&s)[kRowTiles]) {
    const int lane = threadIdx.x % 32;
    uint32_t high[kRowTiles][4], low[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < kRowTiles * 4; ++i) {
      const int tile = i / 4, keys = i % 4 / 2, half = i % 2;
      split_pair<T>(s[tile][keys][2 * half], s[tile][keys][2 * half + 1], high[tile][i % 4], low[tile][i % 4]);
    }
#pragma unroll
    for (int d = 0; d < kWidth; d += 16) {
      uint32_t values[4];  // keys 0-7 and 8-15 of columns d to d + 7, then of columns d + 8 to d + 15
      ldmatrix_x4_trans(values, v + tile_offset<T, kWidth>(lane % 16, d + lane / 16 * 8));
      const uint32_t first[2] = {values[0], values[1]}, second[2] = {values[2], values[3]};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_m16n8k16<T>(sum[i][d / 8], high[i], first);
        mma_m16n8k16<T>(sum[i][d / 8 + 1], high[i], second);
        mma_m16n8k16<T>(sum[i][d / 8], low[i], first);
        mma_m16n8k16<T>(sum[i][d / 8 + 1], low[i], second);
      }
    }
  }

  /// One step of the online softmax over the warp's 16 keys, the first of which is at position `key`.
  __device__ __forceinline__ void attend(const AttentionTask& task, const T* q, const T* k, const T* v, int key) {
    Scores s[kRowTiles];
    score(task.p, q, k, s);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const int first = key + threadIdx.x % 4 * 2;
      const float above = softmax_row(task, rows[i][0], s[i], 0, first);
      const float below = softmax_row(task, rows[i][1], s[i], 1, first);
      // All lanes or none: tensor core products follow, which want the warp together.
      if (__all_sync(kWholeWarp, above == 1.0f && below == 1.0f)) continue;
#pragma unroll
      for (int j = 0; j < kWidth / 8 * 4; ++j) sum[i][j / 4][j % 4] *= j % 4 < 2 ? above : below;
    }
    add_values(v, s);
  }
};

}  // namespace pearl::cuda
