// How verify_attention is cut into blocks: a function of shapes and the device alone, so that a CUDA graph can hold it.
//
// A block has one KV head, some packed rows of one sequence and one split of the keys. Packed row t of a sequence is
// query row t / group, query head t % group of those that share the KV head: a window's rows and a group's heads read
// every page once. Tiles begin at multiples of kTileKeys and splits at multiples of split_keys, whatever the sequence,
// and keys that a row does not see add exact zeros to its sums. So a row's result depends on split_keys, but neither on
// the other rows nor on how many share its block.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "pearl/params.h"

namespace pearl::cuda {

inline constexpr int kTileKeys = 64;       // keys of a tensor core block's step: 16 for each of four warps
inline constexpr int64_t kMinSplit = 256;  // keys: four tiles; less would be all latency
inline constexpr int64_t kWaves = 4;  // of blocks at full context, two a multiprocessor; evens out unlike sequences
inline constexpr int64_t kMaxCapacity = INT32_MAX / kTileKeys * kTileKeys;  // positions are int32
inline constexpr int64_t kWindowRows = 32;                        // up to as many a sequence on average always split
inline constexpr int64_t kPrefillWorkspace = int64_t{128} << 20;  // bytes up to which more rows split as well

/// What the current device can hold.
struct Device {
  int multiprocessors;
  int block_shared, multiprocessor_shared;  // bytes
};

inline cudaError_t current_device(Device& device) {
  int id;
  cudaError_t error = cudaGetDevice(&id);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, id);
  };
  get(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  get(device.block_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(device.multiprocessor_shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return error;
}

/// The keys' division. Splits cover the block tables' capacity; those past a sequence's context end at once.
struct KeySplits {
  int64_t keys;  // of a split, a multiple of kTileKeys
  int64_t count;
};

/// Bytes of one row's partial results: of each split and head sums [D], peak and mass, all fp32.
inline int64_t partial_bytes(const AttentionParams& p, int64_t splits) {
  return p.query_heads * splits * (p.head_dim + 2) * static_cast<int64_t>(sizeof(float));
}

/// The split's size ignores how many rows there are: a decoded row and the same row in a window's verification agree
/// bit for bit. Only prefill, whose rows fill the device and whose partial results would fill its memory, is not split.
inline KeySplits split_keys(const AttentionParams& p, const Device& device) {
  const int64_t capacity = std::max<int64_t>(1, std::min(p.table_width * p.page_size, kMaxCapacity));
  const int64_t blocks = kWaves * 2 * device.multiprocessors;
  const int64_t wanted = std::max(p.sequences * p.kv_heads * capacity / blocks, kMinSplit);
  const int64_t keys = (std::min(wanted, capacity) + kTileKeys - 1) / kTileKeys * kTileKeys;
  const int64_t count = (capacity + keys - 1) / keys;
  const bool fits = p.tokens <= kWindowRows * p.sequences || p.tokens * partial_bytes(p, count) <= kPrefillWorkspace;
  return fits ? KeySplits{keys, count} : KeySplits{(capacity + kTileKeys - 1) / kTileKeys * kTileKeys, 1};
}

/// Packed rows of a tensor core block: as many as the average sequence has, of those sizes that there are.
inline int block_rows(const AttentionParams& p) {
  const int64_t busy = std::min(p.sequences, p.tokens);
  const int64_t packed = (p.tokens + busy - 1) / busy * (p.query_heads / p.kv_heads);
  return packed <= 16 ? 16 : packed <= 32 || p.head_dim > 128 ? 32 : 64;
}

/// Stages of a block's ring of tiles: as many as let two blocks share a multiprocessor, at least two, at most four.
inline int ring_stages(int64_t other_bytes, int64_t stage_bytes, const Device& device) {
  constexpr int64_t kReserved = 1024;  // of each block, by the system
  for (int stages = 4; stages > 2; --stages) {
    const int64_t bytes = other_bytes + stages * stage_bytes + kReserved;
    if (2 * bytes <= device.multiprocessor_shared && bytes - kReserved <= device.block_shared) return stages;
  }
  return 2;
}

/// What the kernels are given.
struct AttentionTask {
  AttentionParams p;
  int group, window;    // window: INT32_MAX if there is none
  int64_t slot_bytes;   // of all heads of a key, in one cache
  int split_keys;       // a multiple of kTileKeys
  int splits;           // blocks of rows whose keys lie in one split write results, the others partial ones
  int stages;           // of the ring of tiles
  bool aligned_q;       // every row of q begins at a multiple of 16 bytes
  float* partial_sum;   // [N, query_heads, splits, D], relative to 2^peak
  float2* partial_row;  // [N, query_heads, splits]: peak and mass
};

}  // namespace pearl::cuda
