// Which rows and keys a block of verify_attention has, and where its results go.
#pragma once

#include "cuda/attention_plan.cuh"
#include "cuda/convert.cuh"
#include "cuda/ptx.cuh"

namespace pearl::cuda {

inline constexpr unsigned kWholeWarp = 0xFFFFFFFFu;
inline constexpr float kLog2e = 1.44269504f;
/// Below every score, yet finite: 2^(kLowest - kLowest) is 1 and 2^(-inf - kLowest) is 0, so that a row that has not
/// seen a key needs no special case.
inline constexpr float kLowest = -3.0e38f;

/// The largest among each group of kGroup neighbouring lanes.
template <int kGroup>
__device__ __forceinline__ float group_max(float x) {
#pragma unroll
  for (int distance = kGroup / 2; distance > 0; distance /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, distance));
  }
  return x;
}

/// The last sequence r with query_start[r] * group / rows + r * spare <= index. Whole warps count over all sequences at
/// once: one load's latency, where a binary search would wait for one after the other.
__device__ __forceinline__ int sequence_at(const AttentionTask& task, int index, int group, int rows, int spare) {
  const int sequences = static_cast<int>(task.p.sequences);
  if (sequences == 1) return 0;
  int count = 0;
  for (int r = threadIdx.x % 32; r < sequences; r += 32) {
    count += task.p.query_start[r] * group / rows + r * spare <= index;
  }
  return __reduce_add_sync(kWholeWarp, count) - 1;
}

/// Packed rows [first, first + count) of a sequence.
struct BlockRows {
  int sequence, first, count;
  int token;     // the sequence's first query row in q
  int position;  // of that row among the sequence's keys; negative if there are more queries than keys
  int partial;   // that row's place among the rows of partial results; -1: there are none

  /// The sequence is not split: the first split's block has all keys.
  __device__ __forceinline__ bool whole() const { return partial < 0; }
};

/// The block's rows; none if there are more blocks than the sequences need. Sequence r owns the blocks from
/// query_start[r] * group / kRows + r up to the next one's first: always as many as its rows fill, at most one more.
template <int kRows>
__device__ __forceinline__ BlockRows block_rows_at(const AttentionTask& task, int index) {
  const int r = sequence_at(task, index, task.group, kRows, 1);
  const int begin = task.p.query_start[r], end = task.p.query_start[r + 1];
  const int first = (index - begin * task.group / kRows - r) * kRows, packed = (end - begin) * task.group;
  const bool whole = task.splits == 1 || end - begin > kWindowRows;
  const int partial = whole ? -1 : task.partial_by_sequence ? r * kWindowRows : begin;
  return {r, first, min(kRows, packed - first), begin, task.p.context_lens[r] - (end - begin), partial};
}

/// Positions [begin, end).
struct KeyRange {
  int begin, end;
};

/// Of a row at a position, which may be negative: then it sees none.
__device__ __forceinline__ KeyRange visible_keys(const AttentionTask& task, int position) {
  return {max(0, max(position, 0) + 1 - task.window), min(position + 1, task.capacity)};
}

/// The same, for one key.
__device__ __forceinline__ bool sees(const AttentionTask& task, int position, int key) {
  return static_cast<unsigned>(position) - static_cast<unsigned>(key) < static_cast<unsigned>(task.window);
}

__device__ __forceinline__ int row_position(const AttentionTask& task, const BlockRows& rows, int row) {
  return rows.position + (rows.first + row) / task.group;
}

__device__ __forceinline__ KeyRange row_keys(const AttentionTask& task, const BlockRows& rows, int row) {
  return visible_keys(task, row_position(task, rows, row));
}

/// Keys of a split, whether or not the sequence has them.
__device__ __forceinline__ KeyRange split_range(const AttentionTask& task, const BlockRows& rows, int split) {
  if (rows.whole()) return {0, split == 0 ? task.capacity : 0};
  return {split * task.split_keys, (split + 1) * task.split_keys};
}

/// Keys that some row of the block sees.
__device__ __forceinline__ KeyRange block_keys(const AttentionTask& task, const BlockRows& rows) {
  return {row_keys(task, rows, 0).begin, row_keys(task, rows, rows.count - 1).end};
}

__device__ __forceinline__ KeyRange overlap(KeyRange a, KeyRange b) {
  return {max(a.begin, b.begin), min(a.end, b.end)};
}

/// Whether all of a's keys are b's.
__device__ __forceinline__ bool within(KeyRange a, KeyRange b) { return a.begin >= b.begin && a.end <= b.end; }

/// Index of a packed row of the block among rows [.., query_heads], of which `first` is the sequence's first.
__device__ __forceinline__ int64_t head_row(const AttentionTask& task, const BlockRows& rows, int first, int row,
                                            int kv_head) {
  const int packed = rows.first + row, head = kv_head * task.group + packed % task.group;
  return (first + packed / task.group) * task.p.query_heads + head;
}

/// The same among those of q and out.
__device__ __forceinline__ int64_t output_row(const AttentionTask& task, const BlockRows& rows, int row, int kv_head) {
  return head_row(task, rows, rows.token, row, kv_head);
}

/// The first slot of a packed row's partial results.
__device__ __forceinline__ int64_t partial_slots(const AttentionTask& task, const BlockRows& rows, int row,
                                                 int kv_head) {
  return head_row(task, rows, rows.partial, row, kv_head) * task.slots;
}

/// Element offset of a packed row of the block in q.
__device__ __forceinline__ int64_t query_offset(const AttentionTask& task, const BlockRows& rows, int row,
                                                int kv_head) {
  const int packed = rows.first + row, head = kv_head * task.group + packed % task.group;
  return (rows.token + packed / task.group) * task.p.q_stride + head * task.p.head_dim;
}

/// Rounds kCount values to T. `to` is a multiple of their size.
template <class T, int kCount>
__device__ __forceinline__ void store_as(T* to, const float (&x)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.values[i] = from_float<T>(x[i]);
  store_pack<true>(to, pack);
}

/// Writes elements index to index + kCount - 1 of the output; index is a multiple of kCount.
template <int kCount>
__device__ __forceinline__ void store_output(const AttentionParams& p, int64_t index, const float (&x)[kCount]) {
  switch (p.q_dtype) {
    case DType::kBFloat16:
      return store_as(static_cast<__nv_bfloat16*>(p.out) + index, x);
    case DType::kFloat16:
      return store_as(static_cast<__half*>(p.out) + index, x);
    default:
      return store_as(static_cast<float*>(p.out) + index, x);
  }
}

/// What turns a row's sums over all keys that it sees into its result: 1 over their mass, relative to 2^peak, and over
/// that of the head's sink, which joins here alone, once for all splits.
__device__ __forceinline__ float normaliser(const AttentionTask& task, const BlockRows& rows, int row, int kv_head,
                                            float peak, float mass) {
  if (task.p.sinks == nullptr) return 1.0f / mass;
  const float sink = task.p.sinks[kv_head * task.group + (rows.first + row) % task.group] * kLog2e;
  const float top = fmaxf(peak, sink), factor = exp2_fast(peak - top);
  return factor / fmaf(mass, factor, exp2_fast(sink - top));
}

/// Columns [column, column + kCount) of a row's result, of its sums, relative to 2^peak, over all keys that it sees.
template <int kCount>
__device__ __forceinline__ void store_result(const AttentionTask& task, const BlockRows& rows, int row, int kv_head,
                                             int column, float (&sum)[kCount], float peak, float mass) {
  const float inverse = normaliser(task, rows, row, kv_head, peak, mass);
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] *= inverse;
  store_output(task.p, output_row(task, rows, row, kv_head) * task.p.head_dim + column, sum);
}

}  // namespace pearl::cuda
