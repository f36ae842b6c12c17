// How verify_attention is cut into blocks: a function of shapes alone, so that a CUDA graph can hold it.
//
// A block has one KV head, some packed rows of one sequence and one split of the keys. Packed row t of a sequence is
// query row t / group, query head t % group of those that share the KV head: a window's rows and a group's heads read
// every page once. Tiles begin at multiples of kTileKeys and splits at multiples of split_keys, which the model alone
// decides, and keys that a row does not see add exact zeros to its sums. So a row's result depends neither on the other
// rows and sequences, nor on how many rows share its block, nor on the GPU.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"
#include "pearl/params.h"

namespace pearl::cuda {

inline constexpr int kTileKeys = 64;            // keys of a tensor core block's step: 16 for each of four warps
inline constexpr int kSplitGroup = 8;           // splits whose partial results are merged first
inline constexpr int kWindowRows = 32;          // of a sequence that is split; prompts fill the GPU as they are
inline constexpr int64_t kMostStrides = 65535;  // of a grid's second dimension
inline constexpr int64_t kMostAtOnce = int64_t{256} << 20;   // bytes of partial results if each split has a block
inline constexpr int64_t kMostWorkspace = int64_t{1} << 30;  // bytes; a call that would need more splits nothing

/// Keys of a split. 512: at batch 1 with 8 KV heads, 8k keys are 128 blocks, one for each multiprocessor of an H100,
/// and 32k are four times as many. Fewer heads make fewer blocks: they get shorter splits, and their partial results, a
/// quarter of the bytes of the keys and values at 64 packed rows, are few. docs/kernels.md has the arithmetic.
constexpr int split_keys(int64_t kv_heads) { return kv_heads < 4 ? 256 : 512; }

/// Positions are int32, and a ring's tiles may lie up to a split past the last key.
inline constexpr int64_t kMaxCapacity = (INT32_MAX / split_keys(INT32_MAX) - 1) * int64_t{split_keys(INT32_MAX)};

/// What the current device can hold, in bytes of shared memory.
struct Device {
  int block_shared, multiprocessor_shared;
};

inline cudaError_t current_device(Device& device) {
  const cudaError_t error = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.block_shared);
  if (error != cudaSuccess) return error;
  return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.multiprocessor_shared);
}

/// Tensor cores take queries and keys of the same two-byte type.
inline bool on_tensor_cores(const AttentionParams& p) {
  return p.q_dtype == p.cache_dtype && p.cache_dtype != DType::kFloat32;
}

/// Packed rows of a block: all that the longest of the sequences has, as far as the sizes go that there are. That is
/// known to the caller only; if it is not, the average sequence's.
inline int block_rows(const AttentionParams& p) {
  if (!on_tensor_cores(p)) return 16;
  const int64_t busy = std::min(p.sequences, p.tokens);
  const int64_t rows = p.most_rows > 0 ? std::min(p.most_rows, p.tokens) : (p.tokens + busy - 1) / busy;
  const int64_t packed = rows * (p.query_heads / p.kv_heads);
  return packed <= 16 ? 16 : packed <= 32 || p.head_dim > 128 ? 32 : 64;
}

/// A call's division. Splits cover the block tables' capacity; those past a sequence's context end at once. Where the
/// partial results of all splits are too many, a block walks over a group's splits, one after the other, and keeps only
/// the group's: the same sums in the same order.
struct Cut {
  int rows;                  // packed, of a block
  int64_t blocks;            // of all rows and KV heads: the grid's first dimension
  int64_t capacity;          // keys that a row of the block tables has room for
  int64_t splits;            // 1: no sequence is split
  int64_t walk;              // splits of a block: 1 or kSplitGroup
  bool partial_by_sequence;  // each sequence has kWindowRows rows of partial results; else every token has one
  int64_t partial_rows;      // how many there are

  int64_t groups() const { return (splits + kSplitGroup - 1) / kSplitGroup; }
  int64_t strides() const { return (splits + walk - 1) / walk; }  // the grid's second dimension
  /// Of partial results, of a row and head: the splits', then the groups'.
  int64_t slots() const { return walk > 1 ? groups() : groups() == 1 ? splits : splits + groups(); }
  int64_t counters_of_block() const { return walk > 1 || groups() == 1 ? 1 : groups() + 1; }
  int64_t counters() const { return splits == 1 ? 0 : blocks * counters_of_block(); }
  /// Elements of partial results: sums [D], and pairs of peak and mass, one, or one for each four sums.
  int64_t sums(const AttentionParams& p) const { return partial_rows * p.query_heads * slots() * p.head_dim; }
  int64_t pairs(const AttentionParams& p) const { return sums(p) / (walk > 1 ? 4 : p.head_dim); }
  int64_t partial_bytes(const AttentionParams& p) const {
    return splits == 1 ? 0 : (sums(p) + 2 * pairs(p)) * static_cast<int64_t>(sizeof(float));
  }
};

inline Cut cut_attention(const AttentionParams& p) {
  Cut cut = {};
  cut.rows = block_rows(p);
  cut.blocks = (p.tokens * (p.query_heads / p.kv_heads) / cut.rows + p.sequences) * p.kv_heads;
  cut.capacity = std::min(p.table_width * p.page_size, kMaxCapacity);
  const int64_t keys = split_keys(p.kv_heads);
  const bool only_a_prompt = p.sequences == 1 && p.tokens > kWindowRows;
  cut.splits = only_a_prompt ? 1 : std::max<int64_t>(1, (cut.capacity + keys - 1) / keys);
  cut.walk = 1;
  cut.partial_by_sequence = p.tokens > kWindowRows * p.sequences;
  cut.partial_rows = cut.partial_by_sequence ? kWindowRows * p.sequences : p.tokens;
  if (cut.partial_bytes(p) > kMostAtOnce) cut.walk = kSplitGroup;
  if (cut.partial_bytes(p) > kMostWorkspace) cut.splits = cut.walk = 1;
  return cut;
}

/// Stages of a block's ring of tiles, two to four: as many as let `resident` blocks share a multiprocessor; where not
/// even two stages do, as many as one block may have.
inline int ring_stages(int64_t other_bytes, int64_t stage_bytes, int resident, const Device& device) {
  constexpr int64_t kReserved = 1024;  // of each block, by the system
  for (int blocks = resident; blocks > 0; --blocks) {
    for (int stages = 4; stages >= 2; --stages) {
      const int64_t bytes = other_bytes + stages * stage_bytes;
      if (bytes <= device.block_shared && blocks * (bytes + kReserved) <= device.multiprocessor_shared) return stages;
    }
  }
  return 2;  // too much for this device: the launch says so
}

/// What the kernels are given.
struct AttentionTask {
  AttentionParams p;
  int group, window;                           // window: INT32_MAX if there is none
  int64_t slot_bytes;                          // of all heads of a key, in one cache
  int capacity, split_keys;                    // split_keys: a multiple of kTileKeys
  int splits, walk, slots, counters_of_block;  // as in Cut
  int group_slot;                              // the first of the groups' slots
  int stages;                                  // of the ring of tiles
  bool aligned_q;                              // every row of q begins at a multiple of 16 bytes
  bool partial_by_sequence;
  float* partial_sum;   // [partial_rows, query_heads, slots, D], relative to 2^peak
  float2* partial_row;  // [partial_rows, query_heads, slots, D / 4 if a block walks, else 1]: peak and mass
  uint32_t* counters;   // [blocks, counters_of_block]: arrivals of each group, then of groups; zero before and after
};

}  // namespace pearl::cuda
