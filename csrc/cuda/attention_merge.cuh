// The exact merge of partial results over the splits of the keys (Flash-Decoding): with peaks m_s (log2), masses l_s
// and sums a_s of the splits, m = max m_s and w_s = 2^(m_s - m), the row is sum_s(w_s a_s) / sum_s(w_s l_s).
//
// The block that comes last merges: first, of each kSplitGroup neighbouring splits, the last of these; then, if the
// block's keys reach over several such groups, the last group's. So no block reads more than kSplitGroup partial
// results of a row at once, however long the context, and groups are merged side by side. Which splits are merged when
// and in what order follows from their positions alone, never from who came last.
#pragma once

#include "cuda/attention_rows.cuh"
#include "cuda/block.cuh"

namespace pearl::cuda {

/// Splits [begin, end) that have keys of a range, which is not empty.
__device__ __forceinline__ KeyRange splits_of(const AttentionTask& task, const BlockRows& rows, KeyRange keys) {
  if (rows.whole()) return {0, 1};
  return {keys.begin / task.split_keys, (keys.end - 1) / task.split_keys + 1};
}

/// Groups [begin, end) that have some of these splits.
__device__ __forceinline__ KeyRange groups_of(KeyRange splits) {
  return {splits.begin / kSplitGroup, (splits.end - 1) / kSplitGroup + 1};
}

__device__ __forceinline__ KeyRange splits_of_group(int group) {
  return {group * kSplitGroup, (group + 1) * kSplitGroup};
}

/// Partial results added up, relative to 2^peak.
struct MergedSum {
  float peak = kLowest, mass = 0.0f, sum[4] = {};
};

/// Columns [column, column + 4) of the partial results in slots [begin, end), in their order. kSplitGroup of them are
/// on their way at a time. L2 has what other blocks wrote; L1 may hold what was there before.
__device__ __forceinline__ MergedSum merge_slots(const AttentionTask& task, int64_t row_slots, KeyRange slots,
                                                 int column) {
  MergedSum merged;
#pragma unroll 1
  for (int first = slots.begin; first < slots.end; first += kSplitGroup) {
    float2 part[kSplitGroup];
    float4 sum[kSplitGroup];
#pragma unroll
    for (int i = 0; i < kSplitGroup; ++i) {
      part[i] = make_float2(kLowest, 0.0f);
      sum[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (first + i >= slots.end) continue;
      part[i] = __ldcg(task.partial_row + row_slots + first + i);
      const float* from = task.partial_sum + (row_slots + first + i) * task.p.head_dim + column;
      sum[i] = __ldcg(reinterpret_cast<const float4*>(from));
    }
    float peak = merged.peak;
#pragma unroll
    for (int i = 0; i < kSplitGroup; ++i) peak = fmaxf(peak, part[i].x);
    const float rescale = exp2_fast(merged.peak - peak);
    merged.peak = peak;
    merged.mass *= rescale;
#pragma unroll
    for (int j = 0; j < 4; ++j) merged.sum[j] *= rescale;
#pragma unroll
    for (int i = 0; i < kSplitGroup; ++i) {
      const float factor = exp2_fast(part[i].x - peak);  // of a slot that there is not: times zeros
      merged.mass += part[i].y * factor;
      merged.sum[0] += sum[i].x * factor;
      merged.sum[1] += sum[i].y * factor;
      merged.sum[2] += sum[i].z * factor;
      merged.sum[3] += sum[i].w * factor;
    }
  }
  return merged;
}

/// Merges, for each row of the block that has keys in several splits, what `group` has of it. The result is stored if
/// that is all, else another partial result.
template <int kThreads>
__device__ __forceinline__ void merge_group(const AttentionTask& task, const BlockRows& rows, int kv_head, int group) {
  const int quads = static_cast<int>(task.p.head_dim) / 4;
  for (int e = threadIdx.x; e < rows.count * quads; e += kThreads) {
    const int row = e / quads, column = e % quads * 4;
    const KeyRange keys = row_keys(task, rows, row);
    if (keys.begin >= keys.end) continue;
    const KeyRange splits = splits_of(task, rows, keys), own = overlap(splits, splits_of_group(group));
    if (splits.end - splits.begin == 1 || own.begin >= own.end) continue;
    MergedSum merged = merge_slots(task, partial_slots(task, rows, row, kv_head), own, column);
    if (within(splits, splits_of_group(group))) {
      store_result(task, rows, row, kv_head, column, merged.sum, merged.mass);
    } else {
      store_partial(task, rows, row, kv_head, task.splits + group, column, merged.sum, merged.peak, merged.mass);
    }
  }
}

/// Stores the rows of the block whose splits are of several groups.
template <int kThreads>
__device__ __forceinline__ void merge_groups(const AttentionTask& task, const BlockRows& rows, int kv_head) {
  const int quads = static_cast<int>(task.p.head_dim) / 4;
  for (int e = threadIdx.x; e < rows.count * quads; e += kThreads) {
    const int row = e / quads, column = e % quads * 4;
    const KeyRange keys = row_keys(task, rows, row);
    if (keys.begin >= keys.end) continue;
    const KeyRange groups = groups_of(splits_of(task, rows, keys));
    if (groups.end - groups.begin == 1) continue;
    const KeyRange slots = {task.splits + groups.begin, task.splits + groups.end};
    MergedSum merged = merge_slots(task, partial_slots(task, rows, row, kv_head), slots, column);
    store_result(task, rows, row, kv_head, column, merged.sum, merged.mass);
  }
}

/// After the block has stored what it has of its split: merges, if it is the last to. All threads call it; `flag` is
/// shared memory that they no longer use otherwise, but need not have met since.
template <int kThreads>
__device__ __forceinline__ void merge_if_last(const AttentionTask& task, const BlockRows& rows, int kv_head, int split,
                                              bool* flag) {
  const KeyRange splits = splits_of(task, rows, block_keys(task, rows));
  if (splits.end - splits.begin == 1) return;
  const int group = split / kSplitGroup;
  uint32_t* const counters = task.counters + static_cast<int64_t>(blockIdx.x) * task.counters_of_block;
  const KeyRange own = overlap(splits, splits_of_group(group));
  if (!last_to_arrive(counters + group, own.end - own.begin, flag)) return;
  merge_group<kThreads>(task, rows, kv_head, group);
  const KeyRange groups = groups_of(splits);
  if (groups.end - groups.begin == 1) return;
  if (!last_to_arrive(counters + task.groups, groups.end - groups.begin, flag)) return;
  merge_groups<kThreads>(task, rows, kv_head);
}

}  // namespace pearl::cuda
