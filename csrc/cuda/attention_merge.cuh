// The exact merge of partial results over the splits of the keys (Flash-Decoding): with peaks m_s (log2), masses l_s
// and sums a_s of the splits, m = max m_s and w_s = 2^(m_s - m), the row is sum_s(w_s a_s) / sum_s(w_s l_s).
#pragma once

#include "cuda/attention_rows.cuh"
#include "cuda/reduce.cuh"

namespace pearl::cuda {

inline constexpr int kMergeWarps = 4, kMaxColumns = 256;

/// Splits [begin, end) with keys that a row sees, at least one.
__device__ __forceinline__ KeyRange live_splits(const AttentionTask& task, KeyRange keys) {
  return {keys.begin / task.split_keys, max(keys.end - 1, 0) / task.split_keys + 1};
}

/// A block a row [N, query_heads]. Warp i adds up every fourth split, lanes four columns each; then the warps' sums are
/// added. Rows whose keys lie in one split have their result already.
__global__ void __launch_bounds__(32 * kMergeWarps) merge_splits(const __grid_constant__ AttentionTask task) {
  __shared__ float4 sums[kMergeWarps][kMaxColumns / 4];
  const int query_heads = static_cast<int>(task.p.query_heads), head_dim = static_cast<int>(task.p.head_dim);
  const int token = blockIdx.x / query_heads, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int r = sequence_at(task, token, 1, 1, 0);
  const int end = task.p.query_start[r + 1];
  if (token >= end) return;
  const KeyRange splits = live_splits(task, visible_keys(task, task.p.context_lens[r] - end + token));
  if (splits.end - splits.begin == 1) return;

  const float2* rows = task.partial_row + static_cast<int64_t>(blockIdx.x) * task.splits;
  float peak = kLowest, mass = 0.0f;
  for (int s = splits.begin + lane; s < splits.end; s += 32) peak = fmaxf(peak, rows[s].x);
  peak = group_max<32>(peak);
  for (int s = splits.begin + lane; s < splits.end; s += 32) mass += rows[s].y * exp2_fast(rows[s].x - peak);
  mass = group_sum<32>(mass);

  const float* partial = task.partial_sum + static_cast<int64_t>(blockIdx.x) * task.splits * head_dim;
  for (int column = 4 * lane; column < head_dim; column += 128) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int s = splits.begin + warp; s < splits.end; s += kMergeWarps) {
      const float factor = exp2_fast(rows[s].x - peak);
      const float4 part = *reinterpret_cast<const float4*>(partial + static_cast<int64_t>(s) * head_dim + column);
      sum.x += part.x * factor;
      sum.y += part.y * factor;
      sum.z += part.z * factor;
      sum.w += part.w * factor;
    }
    sums[warp][column / 4] = sum;
  }
  __syncthreads();
  const int column = 4 * threadIdx.x;
  if (column >= head_dim) return;
  float result[4] = {};
  for (int w = 0; w < kMergeWarps; ++w) {
    const float4 sum = sums[w][threadIdx.x];
    result[0] += sum.x;
    result[1] += sum.y;
    result[2] += sum.z;
    result[3] += sum.w;
  }
  const float inverse = 1.0f / mass;
  for (int i = 0; i < 4; ++i) result[i] *= inverse;
  store_output(task.p, static_cast<int64_t>(blockIdx.x) * head_dim + column, result);
}

}  // namespace pearl::cuda
