// The way of keys and values from a paged cache to shared memory: gathered through the block table, sixteen bytes at a
// time, into a ring of tiles that is filled while earlier tiles are computed with.
#pragma once

#include "cuda/attention_rows.cuh"
#include "cuda/launch.cuh"

namespace pearl::cuda {

/// Element offset in a tile of rows of kWidth elements. A row's 16-byte chunks are permuted so that the same chunk of
/// eight consecutive rows lies in eight different groups of banks, as ldmatrix and a lane a row want it.
template <class T, int kWidth>
__device__ __forceinline__ int tile_offset(int row, int column) {
  constexpr int kChunk = 16 / sizeof(T);
  static_assert(kWidth % (8 * kChunk) == 0, "rows begin at the same bank");
  return row * kWidth + ((column / kChunk) ^ (row & 7)) * kChunk + column % kChunk;
}

/// The block table of a block's sequence.
class PageReader {
 public:
  __device__ __forceinline__ PageReader(const AttentionTask& task, const BlockRows& rows, KeyRange keys)
      : table_(task.p.block_tables + rows.sequence * task.p.table_stride),
        page_size_(static_cast<unsigned>(task.p.page_size)),
        keys_(keys) {}

  /// A key's page. Only those of the block's keys are looked up; other keys get page 0, which exists.
  __device__ __forceinline__ int page(int key) const {
    return key >= keys_.begin && key < keys_.end ? table_[static_cast<unsigned>(key) / page_size_] : 0;
  }

  /// Slots from the beginnings of the caches to a key on this page.
  __device__ __forceinline__ int64_t slot(int page, int key) const {
    return static_cast<int64_t>(page) * page_size_ + static_cast<unsigned>(key) % page_size_;
  }

 private:
  const int32_t* table_;
  unsigned page_size_;
  KeyRange keys_;
};

/// Begins copying kKeys rows of keys and of values to k and v, shared by kThreads threads, whole warps. Lane i has the
/// offset in bytes of row i % kKeys. Rows outside `live` and columns at or past head_dim become zero.
template <class T, int kWidth, int kKeys, int kThreads>
__device__ __forceinline__ void copy_rows(const AttentionTask& task, int kv_head, int64_t offset, KeyRange live,
                                          int thread, T* k, T* v) {
  constexpr int kChunk = 16 / sizeof(T), kChunks = kWidth / kChunk, kRows = kThreads / kChunks;
  static_assert(kKeys <= 32 && kThreads % kChunks == 0 && kKeys % kRows == 0, "all lanes take part in every shuffle");
  const int column = thread % kChunks * kChunk;
  const bool inside = column < task.p.head_dim;
  const int64_t from = (kv_head * task.p.head_dim + (inside ? column : 0)) * static_cast<int64_t>(sizeof(T));
  const char* const k_cache = static_cast<const char*>(task.p.k_cache) + from;
  const char* const v_cache = static_cast<const char*>(task.p.v_cache) + from;
#pragma unroll
  for (int i = 0; i < kKeys; i += kRows) {
    const int row = i + thread / kChunks, to = tile_offset<T, kWidth>(row, column);
    const bool copied = inside && row >= live.begin && row < live.end;
    const int64_t row_offset = __shfl_sync(kWholeWarp, offset, row);
    cp_async_16_or_zero(k + to, k_cache + row_offset, copied);
    cp_async_16_or_zero(v + to, v_cache + row_offset, copied);
  }
}

/// Waits for the oldest tile of a ring into which `stages` - 1 tiles have been begun, each one group of copies.
__device__ __forceinline__ void wait_for_tile(int stages) {
  if (stages == 2) {
    cp_async_wait<0>();
  } else if (stages == 3) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<2>();
  }
}

}  // namespace pearl::cuda
