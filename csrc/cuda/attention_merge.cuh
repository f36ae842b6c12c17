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

/// Partial results added up, relative to 2^peak: four columns of a row.
struct MergedSum {
  float peak = kLowest, mass = 0.0f, sum[4] = {};

  /// The next one. Rounded in one way wherever it is called: by the block that merges, or by one that walks.
  __device__ __forceinline__ void add(float2 peak_mass, const float (&part)[4]) {
    const float top = fmaxf(peak, peak_mass.x), scale = exp2_fast(peak - top), factor = exp2_fast(peak_mass.x - top);
    peak = top;
    mass = fmaf(peak_mass.y, factor, __fmul_rn(mass, scale));
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[j] = fmaf(part[j], factor, __fmul_rn(sum[j], scale));
  }
};

/// Where four columns of partial results are: sums, and peak and mass.
struct PartialPlace {
  float* sum;
  float2* row;
};

__device__ __forceinline__ PartialPlace partial_place(const AttentionTask& task, int64_t slot, int column) {
  const int head_dim = static_cast<int>(task.p.head_dim);
  float2* const row = task.partial_row + (task.walk == 1 ? slot : slot * (head_dim / 4) + column / 4);
  return {task.partial_sum + slot * head_dim + column, row};
}

__device__ __forceinline__ void store_partial(const AttentionTask& task, int64_t slot, int column,
                                              const MergedSum& merged) {
  const PartialPlace place = partial_place(task, slot, column);
  store_as(place.sum, merged.sum);
  if (task.walk != 1 || column == 0) *place.row = make_float2(merged.peak, merged.mass);
}

/// Columns [column, column + 4) of the partial results in slots [begin, end), in their order. kSplitGroup of them are
/// on their way at a time. L2 has what other blocks wrote; L1 may hold what was there before.
__device__ __forceinline__ MergedSum merge_slots(const AttentionTask& task, int64_t row_slots, KeyRange slots,
                                                 int column) {
  MergedSum merged;
#pragma unroll 1
  for (int first = slots.begin; first < slots.end; first += kSplitGroup) {
    float2 row[kSplitGroup];
    float4 sum[kSplitGroup];
#pragma unroll
    for (int i = 0; i < kSplitGroup; ++i) {
      if (first + i >= slots.end) continue;
      const PartialPlace place = partial_place(task, row_slots + first + i, column);
      row[i] = __ldcg(place.row);
      sum[i] = __ldcg(reinterpret_cast<const float4*>(place.sum));
    }
#pragma unroll
    for (int i = 0; i < kSplitGroup; ++i) {
      if (first + i < slots.end) merged.add(row[i], {sum[i].x, sum[i].y, sum[i].z, sum[i].w});
    }
  }
  return merged;
}

/// What a row has of one split, by a block that walks, whose thread did the same columns of the split before: added to
/// what the row has of the group so far.
__device__ __forceinline__ void add_to_group(const AttentionTask& task, const BlockRows& rows, int row, int kv_head,
                                             int split, int column, const float (&sum)[4], float peak, float mass) {
  const int group = split / kSplitGroup;
  const KeyRange splits = splits_of(task, rows, row_keys(task, rows, row)), in_group = splits_of_group(group);
  const KeyRange own = overlap(splits, in_group);
  const int64_t slot = partial_slots(task, rows, row, kv_head) + task.group_slot + group;
  MergedSum merged;
  if (split > own.begin) {
    const PartialPlace place = partial_place(task, slot, column);
    const float4 so_far = *reinterpret_cast<const float4*>(place.sum);
    merged = {place.row->x, place.row->y, {so_far.x, so_far.y, so_far.z, so_far.w}};
  }
  merged.add(make_float2(peak, mass), sum);
  if (split + 1 == own.end && within(splits, in_group)) {
    store_result(task, rows, row, kv_head, column, merged.sum, merged.peak, merged.mass);
  } else {
    store_partial(task, slot, column, merged);
  }
}

/// Columns [column, column + 4) of a row's sums over a split, relative to 2^peak: the result if all keys that the row
/// sees are in this split, a partial one if only some are, nothing if none is.
__device__ __forceinline__ void store_row(const AttentionTask& task, const BlockRows& rows, int row, int kv_head,
                                          int split, int column, float (&sum)[4], float peak, float mass) {
  const KeyRange keys = row_keys(task, rows, row), range = split_range(task, rows, split), both = overlap(keys, range);
  if (both.begin >= both.end) return;
  if (within(keys, range)) {
    store_result(task, rows, row, kv_head, column, sum, peak, mass);
  } else if (task.walk == 1) {
    const int64_t slot = partial_slots(task, rows, row, kv_head) + split;
    store_partial(task, slot, column, {peak, mass, {sum[0], sum[1], sum[2], sum[3]}});
  } else {
    add_to_group(task, rows, row, kv_head, split, column, sum, peak, mass);
  }
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
      store_result(task, rows, row, kv_head, column, merged.sum, merged.peak, merged.mass);
    } else {
      store_partial(task, partial_slots(task, rows, row, kv_head) + task.group_slot + group, column, merged);
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
    const KeyRange slots = {task.group_slot + groups.begin, task.group_slot + groups.end};
    MergedSum merged = merge_slots(task, partial_slots(task, rows, row, kv_head), slots, column);
    store_result(task, rows, row, kv_head, column, merged.sum, merged.peak, merged.mass);
  }
}

/// After the block has stored what it has of its splits, the first of which is `split`: merges, if it is the last to.
/// All threads call it; `flag` is shared memory that they no longer use otherwise, but need not have met since.
template <int kThreads>
__device__ __forceinline__ void merge_if_last(const AttentionTask& task, const BlockRows& rows, int kv_head, int split,
                                              bool* flag) {
  const KeyRange splits = splits_of(task, rows, block_keys(task, rows)), groups = groups_of(splits);
  if (splits.end - splits.begin == 1) return;
  const int group = split / kSplitGroup;
  uint32_t* const counters = task.counters + static_cast<int64_t>(blockIdx.x) * task.counters_of_block;
  if (task.walk == 1) {
    const KeyRange own = overlap(splits, splits_of_group(group));
    if (!last_to_arrive(counters + group, own.end - own.begin, flag)) return;
    merge_group<kThreads>(task, rows, kv_head, group);
  }
  if (groups.end - groups.begin == 1) return;
  if (!last_to_arrive(counters + task.counters_of_block - 1, groups.end - groups.begin, flag)) return;
  merge_groups<kThreads>(task, rows, kv_head);
}

/// The splits of a block that have keys for it; where it does not walk, the only one, with keys or without.
template <int kRows>
__device__ __forceinline__ KeyRange splits_to_walk(const AttentionTask& task) {
  const int first = blockIdx.y * task.walk;
  if (task.walk == 1) return {first, first + 1};
  const BlockRows rows = block_rows_at<kRows>(task, blockIdx.x / static_cast<int>(task.p.kv_heads));
  if (rows.count <= 0) return {};
  const KeyRange keys = block_keys(task, rows);
  return keys.begin < keys.end ? overlap(splits_of(task, rows, keys), {first, first + task.walk}) : KeyRange{};
}

/// A block's work: attend(split) for each of its splits, which tells whether there was anything to do and sets `rows`
/// to the block's; then the merge. `flag`: shared memory, which `attend` may use as well.
template <int kThreads, int kRows, class Attend>
__device__ __forceinline__ void walk(const AttentionTask& task, BlockRows& rows, bool* flag, const Attend& attend) {
  const KeyRange splits = splits_to_walk<kRows>(task);
#pragma unroll 1
  for (int split = splits.begin; split < splits.end; ++split) {
    if (split > splits.begin) __syncthreads();  // other warps may still use what the next queries and keys go over
    if (!attend(split)) return;
  }
  if (splits.begin >= splits.end) return;
  const int kv_head = blockIdx.x % static_cast<int>(task.p.kv_heads);
  merge_if_last<kThreads>(task, rows, kv_head, blockIdx.y * task.walk, flag);
}

}  // namespace pearl::cuda
