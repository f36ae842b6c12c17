// verify_attention: online softmax over the pages of one KV head, for all the query rows that read it.
//
// The rows of a sequence and the heads of a GQA group are packed into one list: packed row t is query row t / group,
// head t % group. A block of packed rows walks over the keys tile by tile, so that decoding and verification read every
// page once. Tiles are widened to fp32 and padded with zeros to whole vectors; what follows has no special cases.

namespace pearl::PEARL_ISA {

inline constexpr int64_t kTileKeys = 32;
inline constexpr int64_t kBlockRows = kAttentionRows;

/// One block's working set. Rows are `width` floats apart, the head's width rounded up to whole vectors.
struct alignas(64) AttentionBlock {
  float k[kTileKeys * kMaxHeadDim];
  float v[kTileKeys * kMaxHeadDim];
  float q[kBlockRows * kMaxHeadDim];    // times the scale
  float sum[kBlockRows * kMaxHeadDim];  // of probability * v, relative to peak
  float score[kBlockRows * kTileKeys];  // then probabilities
  float peak[kBlockRows];               // largest score so far
  float mass[kBlockRows];               // of the probabilities, relative to peak
  int64_t position[kBlockRows];
  int64_t rows, width;
};

/// Keys of one sequence and head.
using KeyRange = Range;

inline KeyRange visible_keys(const AttentionParams& p, int64_t position) {
  const int64_t oldest = position + 1 - p.window;
  return {p.window > 0 && oldest > 0 ? oldest : 0, position + 1};
}

template <class T>
inline void widen_row(const T* from, int64_t count, float* to) {
  for_each_vector(count, [&](int64_t i, int64_t n) { store(to + i, load_some(from + i, n)); });
}

/// Packed rows [first, first + block.rows) of the sequence whose queries start at token `begin`.
template <class Q>
inline void load_queries(const AttentionParams& p, int64_t begin, int64_t head, int64_t first, AttentionBlock& block) {
  const int64_t group = p.query_heads / p.kv_heads;
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t row = (first + i) / group, query_head = head * group + (first + i) % group;
    float* q = block.q + i * block.width;
    widen_row(static_cast<const Q*>(p.q) + (begin + row) * p.q_stride + query_head * p.head_dim, p.head_dim, q);
    for (int64_t d = 0; d < block.width; d += kLanes) {
      store(q + d, load(q + d) * broadcast(p.scale));
      store(block.sum + i * block.width + d, broadcast(0.0f));
    }
    block.peak[i] = kMinusInfinity;
    block.mass[i] = 0.0f;
  }
}

/// Keys and values of a tile, which begins at block.k and block.v, widened.
template <class T>
inline void load_tile(const AttentionParams& p, const int32_t* table, int64_t head, KeyRange keys,
                      AttentionBlock& block) {
  const int64_t slot_size = p.kv_heads * p.head_dim;
  float *k = block.k, *v = block.v;
  for (int64_t key = keys.begin; key < keys.end;) {
    const int64_t page = key / p.page_size, page_end = (page + 1) * p.page_size;
    int64_t offset = (table[page] * p.page_size + key % p.page_size) * slot_size + head * p.head_dim;
    for (const int64_t end = keys.end < page_end ? keys.end : page_end; key < end; ++key) {
      widen_row(static_cast<const T*>(p.k_cache) + offset, p.head_dim, k);
      widen_row(static_cast<const T*>(p.v_cache) + offset, p.head_dim, v);
      offset += slot_size;
      k += block.width;
      v += block.width;
    }
  }
  // Scores are made sixteen keys at a time. The surplus is masked, but must be finite.
  for (int64_t i = keys.end - keys.begin; i % kLanes != 0; ++i) {
    for (int64_t d = 0; d < block.width; d += kLanes) store(block.k + i * block.width + d, broadcast(0.0f));
  }
}

/// Sums of kRows rows of q times kKeys keys, four keys to a Part.
template <int kRows, int kKeys>
inline void dot_keys(const float* q, const float* k, int64_t width, Part (&fours)[kRows][kKeys / 4]) {
  Part partial[kRows][kKeys / 4][4];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kKeys; ++i) partial[r][i / 4][i % 4] = zero_part();
  }
  for (int64_t d = 0; d < width; d += kPartLanes) {
    Part key[kKeys];
    for (int i = 0; i < kKeys; ++i) key[i] = load_part(k + i * width + d);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Part query = load_part(q + r * width + d);
      for (int i = 0; i < kKeys; ++i) partial[r][i / 4][i % 4] = mul_add(query, key[i], partial[r][i / 4][i % 4]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int f = 0; f < kKeys / 4; ++f) fours[r][f] = add_fours(partial[r][f]);
  }
}

/// Products of kRows rows of q with `keys` rows of k, a multiple of sixteen, into rows of score.
template <int kRows>
inline void dot_rows(const float* q, const float* k, int64_t width, int64_t keys, float* score) {
  constexpr int kFours = kPartLanes / 4, kAtOnce = 2 * kRows <= kDotRows && kFours > 1 ? 2 : 1;
  for (int64_t j = 0; j < keys; j += kPartLanes) {
    Part fours[kRows][kFours];
    for (int f = 0; f < kFours; f += kAtOnce) {
      Part some[kRows][kAtOnce];
      dot_keys<kRows, 4 * kAtOnce>(q, k + (j + 4 * f) * width, width, some);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        for (int i = 0; i < kAtOnce; ++i) fours[r][f + i] = some[r][i];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) store(score + r * kTileKeys + j, join_fours(fours[r]));
  }
}

/// Row i's scores against the tile become probabilities, and what the row summed up before is brought to the new peak.
/// `seen` are the keys of the tile that the row sees.
inline void weigh_row(const AttentionParams& p, AttentionBlock& block, int64_t i, KeyRange seen) {
  float* score = block.score + i * kTileKeys;
  Vec top = broadcast(kMinusInfinity);
  for (int64_t j = 0; j < seen.end; j += kLanes) {
    Vec s = load(score + j);
    if (p.softcap > 0) s = broadcast(p.softcap) * tanh(s / broadcast(p.softcap));
    s = select(lane_range(seen.begin - j, seen.end - j), s, broadcast(kMinusInfinity));
    top = max(top, s);
    store(score + j, s);
  }
  const float tile_peak = reduce_max(top), peak = tile_peak > block.peak[i] ? tile_peak : block.peak[i];
  Vec mass = broadcast(0.0f);
  for (int64_t j = 0; j < seen.end; j += kLanes) {
    const Vec probability = exp(load(score + j) - broadcast(peak));
    mass = mass + probability;
    store(score + j, probability);
  }
  if (peak != block.peak[i]) {
    const float rescale = block.peak[i] == kMinusInfinity ? 0.0f : reduce_max(exp(broadcast(block.peak[i] - peak)));
    float* sum = block.sum + i * block.width;
    for (int64_t d = 0; d < block.width; d += kLanes) store(sum + d, load(sum + d) * broadcast(rescale));
    block.mass[i] *= rescale;
    block.peak[i] = peak;
  }
  block.mass[i] += reduce_add(mass);
}

/// sum += probabilities @ v over the keys of the tile for kRows rows, kParts parts of the head from d on.
template <int kRows, int kParts>
inline void accumulate(AttentionBlock& block, int64_t i, KeyRange keys, int64_t d) {
  float* sum = block.sum + i * block.width + d;
  const float* probability = block.score + i * kTileKeys;
  Part total[kRows][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kParts; ++c) total[r][c] = load_part(sum + r * block.width + c * kPartLanes);
  }
  for (int64_t j = keys.begin; j < keys.end; ++j) {
    Part v[kParts];
    for (int c = 0; c < kParts; ++c) v[c] = load_part(block.v + j * block.width + d + c * kPartLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Part weight = broadcast_number(probability[r * kTileKeys + j]);
      for (int c = 0; c < kParts; ++c) total[r][c] = mul_add(weight, v[c], total[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kParts; ++c) store(sum + r * block.width + c * kPartLanes, total[r][c]);
  }
}

/// The whole head's width.
template <int kRows>
inline void accumulate_rows(AttentionBlock& block, int64_t i, KeyRange keys) {
  if (keys.begin >= keys.end) return;
  int64_t d = 0;
  for (; d + 4 * kPartLanes <= block.width; d += 4 * kPartLanes) accumulate<kRows, 4>(block, i, keys, d);
  for (; d < block.width; d += kPartLanes) accumulate<kRows, 1>(block, i, keys, d);
}

/// Keys of the tile that packed row i sees.
inline KeyRange seen_keys(const AttentionParams& p, const AttentionBlock& block, int64_t i, KeyRange tile) {
  const KeyRange keys = visible_keys(p, block.position[i]);
  return {keys.begin > tile.begin ? keys.begin - tile.begin : 0,
          (keys.end < tile.end ? keys.end : tile.end) - tile.begin};
}

/// Packed rows [i, i + kRows) against the tile. From row to row neither end of what is seen moves back: between the
/// keys that only some rows see lie those that all see, whose values are read once for all.
template <int kRows>
inline void attend_rows(const AttentionParams& p, AttentionBlock& block, int64_t i, KeyRange tile) {
  const int64_t keys = (tile.end - tile.begin + kLanes - 1) / kLanes * kLanes;
  dot_rows<kRows>(block.q + i * block.width, block.k, block.width, keys, block.score + i * kTileKeys);
  KeyRange seen[kRows], common = {0, kTileKeys};
  for (int r = 0; r < kRows; ++r) {
    seen[r] = seen_keys(p, block, i + r, tile);
    if (seen[r].begin < seen[r].end) weigh_row(p, block, i + r, seen[r]);
    common = {seen[r].begin > common.begin ? seen[r].begin : common.begin,
              seen[r].end < common.end ? seen[r].end : common.end};
  }
  if (common.begin >= common.end) common = {kTileKeys, kTileKeys};
  for (int r = 0; r < kRows; ++r) {
    accumulate_rows<1>(block, i + r, {seen[r].begin, seen[r].end < common.begin ? seen[r].end : common.begin});
  }
  accumulate_rows<kRows>(block, i, common);
  for (int r = 0; r < kRows; ++r) {
    accumulate_rows<1>(block, i + r, {seen[r].begin > common.end ? seen[r].begin : common.end, seen[r].end});
  }
}

/// As many of the packed rows from i on as there are, at most kRows, against the tile; returns how many.
template <int kRows>
inline int64_t attend_some(const AttentionParams& p, AttentionBlock& block, int64_t i, KeyRange tile) {
  if constexpr (kRows > 1) {
    if (i + kRows > block.rows) return attend_some<kRows - 1>(p, block, i, tile);
  }
  attend_rows<kRows>(p, block, i, tile);
  return kRows;
}

inline void attend_tile(const AttentionParams& p, AttentionBlock& block, KeyRange tile) {
  for (int64_t i = 0; i < block.rows;) i += attend_some<kDotRows>(p, block, i, tile);
}

template <class Q>
inline void store_outputs(const AttentionParams& p, int64_t begin, int64_t head, int64_t first,
                          const AttentionBlock& block) {
  const int64_t group = p.query_heads / p.kv_heads;
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t row = begin + (first + i) / group, query_head = head * group + (first + i) % group;
    Q* out = static_cast<Q*>(p.out) + (row * p.query_heads + query_head) * p.head_dim;
    const Vec inverse = broadcast(1.0f / block.mass[i]);
    for_each_vector(p.head_dim, [&](int64_t d, int64_t n) {
      store_some(out + d, load(block.sum + i * block.width + d) * inverse, n);
    });
  }
}

/// All tiles that some row of the block sees. They begin at multiples of their size, whatever rows the block has.
template <class T>
inline void attend_keys(const AttentionParams& p, int64_t sequence, int64_t head, AttentionBlock& block) {
  const int32_t* table = p.block_tables + sequence * p.table_stride;
  const int64_t begin = visible_keys(p, block.position[0]).begin / kTileKeys * kTileKeys;
  const int64_t end = visible_keys(p, block.position[block.rows - 1]).end;
  for (int64_t key = begin; key < end; key += kTileKeys) {
    const KeyRange tile = {key, key + kTileKeys < end ? key + kTileKeys : end};
    load_tile<T>(p, table, head, tile, block);
    attend_tile(p, block, tile);
  }
}

/// Packed rows [first, first + kBlockRows) of one sequence and KV head, as many as there are.
inline void attend_block(const AttentionParams& p, int64_t r, int64_t head, int64_t first, AttentionBlock& block) {
  const int64_t group = p.query_heads / p.kv_heads;
  const int64_t begin = p.query_start[r], rows = p.query_start[r + 1] - begin;
  if (first >= rows * group) return;
  block.rows = rows * group - first < kBlockRows ? rows * group - first : kBlockRows;
  block.width = (p.head_dim + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < block.rows; ++i) block.position[i] = p.context_lens[r] - rows + (first + i) / group;
  const bool narrow_q = p.q_dtype == DType::kBFloat16, narrow_cache = p.cache_dtype == DType::kBFloat16;
  narrow_q ? load_queries<BFloat16>(p, begin, head, first, block) : load_queries<float>(p, begin, head, first, block);
  narrow_cache ? attend_keys<BFloat16>(p, r, head, block) : attend_keys<float>(p, r, head, block);
  narrow_q ? store_outputs<BFloat16>(p, begin, head, first, block) : store_outputs<float>(p, begin, head, first, block);
}

void verify_attention(const AttentionParams& p, Range tasks) {
  AttentionBlock block;
  const int64_t blocks = attention_blocks(p);
  for (int64_t task = tasks.begin; task < tasks.end; ++task) {
    const int64_t pair = task / blocks;
    attend_block(p, pair / p.kv_heads, pair % p.kv_heads, task % blocks * kBlockRows, block);
  }
}

}  // namespace pearl::PEARL_ISA
