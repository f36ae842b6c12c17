// What verify_attention keeps of a block of rows, and how a tile of keys and values comes into it.
//
// Keys are turned around: a tile holds word after word of all its keys, so that scores of a whole vector of keys add up
// without sums across lanes. A word is a pair of bf16 where q and the cache are bf16 and the hardware multiplies pairs,
// else an fp32 number. Values are read where they lie, unless the head is no whole number of vectors.

namespace pearl::PEARL_ISA {

inline constexpr int64_t kTileKeys = 64;
inline constexpr int64_t kBlockRows = kAttentionRows;

/// Keys of one sequence and head.
using KeyRange = Range;

/// One block's working set. Rows of sums and values are `width` floats apart, the head's width rounded up to whole
/// vectors.
struct alignas(64) AttentionBlock {
  float k[kMaxHeadDim * kTileKeys];  // [words, kTileKeys]; words of bf16 lie in floats, which nothing computes with
  float v[kTileKeys * kMaxHeadDim];
  float q[kBlockRows * kMaxHeadDim];    // [rows, words]
  float sum[kBlockRows * kMaxHeadDim];  // of probability * v, relative to peak
  float score[kBlockRows * kTileKeys];  // then probabilities
  float mass[kBlockRows * kLanes];      // of the probabilities, relative to peak; the sum of the lanes
  float peak[kBlockRows];               // largest score so far
  int64_t position[kBlockRows];
  int64_t rows, width, words;
  const void* key[kTileKeys];    // where the tile's keys and values lie in the caches
  const void* value[kTileKeys];  // or in v
};

/// Whether words are pairs, where q and the cache are bf16: as those of linear's weight.
inline constexpr bool kPairWords = BFloat16Weight::kWords == 1;

inline bool has_pairs(const AttentionParams& p) {
  return kPairWords && p.q_dtype == DType::kBFloat16 && p.cache_dtype == DType::kBFloat16;
}

/// Notes where keys and values lie. Scores are made sixteen keys at a time: the surplus, which is masked, repeats the
/// last key.
template <class T>
inline void find_keys(const AttentionParams& p, const int32_t* table, int64_t head, KeyRange keys,
                      AttentionBlock& block) {
  const int64_t slot_size = p.kv_heads * p.head_dim;
  int64_t i = 0;
  for (int64_t key = keys.begin; key < keys.end;) {
    const int64_t page = key / p.page_size, page_end = (page + 1) * p.page_size;
    int64_t offset = (table[page] * p.page_size + key % p.page_size) * slot_size + head * p.head_dim;
    for (const int64_t end = keys.end < page_end ? keys.end : page_end; key < end; ++key, ++i) {
      block.key[i] = static_cast<const T*>(p.k_cache) + offset;
      block.value[i] = static_cast<const T*>(p.v_cache) + offset;
      offset += slot_size;
    }
  }
  for (; i % kLanes != 0; ++i) block.key[i] = block.key[i - 1];
}

/// The words of sixteen keys, turned around: `to` is where the first one's go. Four at a time, which every head's width
/// is a multiple of; words of bf16 are taken apart where numbers are wanted.
template <bool kSplit>
inline void turn_keys(const void* const* key, int64_t words, float* to) {
  for (int64_t word = 0; word < words; word += 4) {
    Bits x[4];
    for (int i = 0; i < 4; ++i) {
      const auto at = [&](int quarter) { return static_cast<const char*>(key[4 * quarter + i]) + 4 * word; };
      x[i] = load_quarters(at(0), at(1), at(2), at(3));
    }
    transpose_4x4(x);
    for (int i = 0; i < 4; ++i) {
      if constexpr (kSplit) {
        store(to + 2 * (word + i) * kTileKeys, float_of(shift_left(x[i], 16)));
        store(to + (2 * (word + i) + 1) * kTileKeys, float_of(x[i] & broadcast_bits(0xFFFF0000)));
      } else {
        store(to + (word + i) * kTileKeys, float_of(x[i]));
      }
    }
  }
}

/// Widens the tile's values, with zeros up to block.width.
template <class T>
inline void widen_values(int64_t head_dim, int64_t keys, AttentionBlock& block) {
  for (int64_t j = 0; j < keys; ++j) {
    const T* from = static_cast<const T*>(block.value[j]);
    float* to = block.v + j * block.width;
    for_each_vector(head_dim, [&](int64_t i, int64_t n) { store(to + i, load_some(from + i, n)); });
    block.value[j] = to;
  }
}

/// Asks for rows of a tile all at once: where several heads share a slot, the hardware's prefetcher follows their
/// stride badly.
inline void ask_for(const void* const* rows, int64_t count, int64_t bytes) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t at = 0; at < bytes; at += kLineBytes) {
      __builtin_prefetch(static_cast<const char*>(rows[i]) + at, 0, 3);
    }
  }
}

/// Keys and values of a tile. Returns whether the values were widened to block.v.
template <class T>
inline bool load_tile(const AttentionParams& p, const int32_t* table, int64_t head, KeyRange keys,
                      AttentionBlock& block) {
  find_keys<T>(p, table, head, keys, block);
  const int64_t count = keys.end - keys.begin, words = p.head_dim * static_cast<int64_t>(sizeof(T)) / 4;
  ask_for(block.key, count, 4 * words);
  ask_for(block.value, count, 4 * words);  // on their way while the keys are turned around
  for (int64_t i = 0; i < count; i += kLanes) {
    if (sizeof(T) == 2 && block.words == p.head_dim) {
      turn_keys<true>(block.key + i, words, block.k + i);
    } else {
      turn_keys<false>(block.key + i, words, block.k + i);
    }
  }
  const bool widened = p.head_dim != block.width;
  if (widened) widen_values<T>(p.head_dim, count, block);
  return widened;
}

}  // namespace pearl::PEARL_ISA
