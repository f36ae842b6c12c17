// verify_attention: online softmax over the pages of one KV head, for all the query rows that read it.
//
// The rows of a sequence and the heads of a GQA group are packed into one list: packed row t is query row t / group,
// head t % group. A block of packed rows walks over the keys tile by tile, so that decoding and verification read every
// page once. What is added up for a row, and in which order, depends on its keys only: not on the rows beside it.

namespace pearl::PEARL_ISA {

inline KeyRange visible_keys(const AttentionParams& p, int64_t position) {
  const int64_t oldest = position + 1 - p.window;
  return {p.window > 0 && oldest > 0 ? oldest : 0, position + 1};
}

/// Packed rows [first, first + block.rows) of the sequence whose queries start at token `begin`.
template <class Q>
inline void load_queries(const AttentionParams& p, int64_t begin, int64_t head, int64_t first, AttentionBlock& block) {
  const int64_t group = p.query_heads / p.kv_heads;
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t row = (first + i) / group, query_head = head * group + (first + i) % group;
    const Q* from = static_cast<const Q*>(p.q) + (begin + row) * p.q_stride + query_head * p.head_dim;
    float* q = block.q + i * block.words;
    if (block.words < p.head_dim) {
      __builtin_memcpy(q, from, p.head_dim * sizeof(Q));
    } else {
      for_each_vector(p.head_dim, [&](int64_t d, int64_t n) { store_some(q + d, load_some(from + d, n), n); });
    }
    for (int64_t d = 0; d < block.width; d += kLanes) store(block.sum + i * block.width + d, broadcast(0.0f));
    store(block.mass + i * kLanes, broadcast(0.0f));
    block.peak[i] = kMinusInfinity;
  }
}

/// Products of kRows rows of q with kParts parts of the tile's keys, as rows of score. The words are read as linear
/// reads a weight's.
template <class W, int kRows, int kParts>
inline void dot_keys(const float* q, const float* k, int64_t words, float* score) {
  Part sum[kRows][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kParts; ++i) sum[r][i] = zero_part();
  }
  for (int64_t word = 0; word < words; ++word) {
    multiply_word<W>(reinterpret_cast<const char*>(q + word), 4 * words,
                     reinterpret_cast<const char*>(k + word * kTileKeys), 0, 0, sum);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kParts; ++i) store(score + r * kTileKeys + i * kPartLanes, sum[r][i]);
  }
}

/// Scores of kRows rows from i on against `keys` keys of the tile, rounded up to whole vectors.
template <class W, int kRows>
inline void dot_rows(AttentionBlock& block, int64_t i, int64_t keys) {
  const float* q = block.q + i * block.words;
  float* score = block.score + i * kTileKeys;
  const int64_t end = (keys + kLanes - 1) / kLanes * kLanes;
  int64_t j = 0;
  const auto dot_all = [&](auto parts) {
    constexpr int kParts = decltype(parts)::kCount;
    for (; j + kParts * kPartLanes <= end; j += kParts * kPartLanes) {
      dot_keys<W, kRows, kParts>(q, block.k + j, block.words, score + j);
    }
  };
  dot_all(Count<row_parts(kRows)>{});
  if constexpr (row_parts(kRows) > 2) dot_all(Count<2>{});
  if constexpr (row_parts(kRows) > 1) dot_all(Count<1>{});
}

/// Multiplies row i's sums by e^difference, which it returns in every lane.
inline Vec rescale_sums(AttentionBlock& block, int64_t i, float difference) {
  const Vec factor = exp(broadcast(difference));
  float* sum = block.sum + i * block.width;
  for (int64_t d = 0; d < block.width; d += kLanes) store(sum + d, load(sum + d) * factor);
  return factor;
}

/// Row i's scores against the tile become probabilities, and what the row summed up before is brought to the new peak.
/// `seen` are the keys of the tile that the row sees.
inline void weigh_row(const AttentionParams& p, AttentionBlock& block, int64_t i, KeyRange seen) {
  float* score = block.score + i * kTileKeys;
  Vec top = broadcast(kMinusInfinity);
  for (int64_t j = 0; j < seen.end; j += kLanes) {
    Vec s = load(score + j) * broadcast(p.scale);
    if (p.softcap > 0) s = broadcast(p.softcap) * tanh(s / broadcast(p.softcap));
    s = select(lane_range(seen.begin - j, seen.end - j), s, broadcast(kMinusInfinity));
    top = max(top, s);
    store(score + j, s);
  }
  const float tile_peak = reduce_max(top), peak = tile_peak > block.peak[i] ? tile_peak : block.peak[i];
  Vec mass = load(block.mass + i * kLanes);
  if (peak != block.peak[i]) {
    // A first peak finds sums of zero: there is nothing to bring to it.
    if (block.peak[i] != kMinusInfinity) mass = mass * rescale_sums(block, i, block.peak[i] - peak);
    block.peak[i] = peak;
  }
  for (int64_t j = 0; j < seen.end; j += kLanes) {
    const Vec probability = exp(load(score + j) - broadcast(peak));
    mass = mass + probability;
    store(score + j, probability);
  }
  store(block.mass + i * kLanes, mass);
}

/// sum += probabilities @ v over the keys of the tile for kRows rows, kParts parts of the head from d on.
template <class V, int kRows, int kParts>
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
    for (int c = 0; c < kParts; ++c) v[c] = load_part(static_cast<const V*>(block.value[j]) + d + c * kPartLanes);
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
template <class V, int kRows>
inline void accumulate_rows(AttentionBlock& block, int64_t i, KeyRange keys) {
  if (keys.begin >= keys.end) return;
  constexpr int kParts = row_parts(kRows);
  int64_t d = 0;
  for (; d + kParts * kPartLanes <= block.width; d += kParts * kPartLanes)
    accumulate<V, kRows, kParts>(block, i, keys, d);
  for (; d < block.width; d += kPartLanes) accumulate<V, kRows, 1>(block, i, keys, d);
}

/// Keys of the tile that packed row i sees.
inline KeyRange seen_keys(const AttentionParams& p, const AttentionBlock& block, int64_t i, KeyRange tile) {
  const KeyRange keys = visible_keys(p, block.position[i]);
  return {keys.begin > tile.begin ? keys.begin - tile.begin : 0,
          (keys.end < tile.end ? keys.end : tile.end) - tile.begin};
}

/// Packed rows [i, i + kRows), whose scores are there, against the tile. From row to row neither end of what is seen
/// moves back: between the keys that only some rows see lie those that all see, whose values are read once for all.
template <class V, int kRows>
inline void attend_rows(const AttentionParams& p, AttentionBlock& block, int64_t i, KeyRange tile) {
  KeyRange seen[kRows], common = {0, kTileKeys};
  for (int r = 0; r < kRows; ++r) {
    seen[r] = seen_keys(p, block, i + r, tile);
    if (seen[r].begin < seen[r].end) weigh_row(p, block, i + r, seen[r]);
    common = {seen[r].begin > common.begin ? seen[r].begin : common.begin,
              seen[r].end < common.end ? seen[r].end : common.end};
  }
  if (common.begin >= common.end) common = {kTileKeys, kTileKeys};
  for (int r = 0; r < kRows; ++r) {
    accumulate_rows<V, 1>(block, i + r, {seen[r].begin, seen[r].end < common.begin ? seen[r].end : common.begin});
  }
  accumulate_rows<V, kRows>(block, i, common);
  for (int r = 0; r < kRows; ++r) {
    accumulate_rows<V, 1>(block, i + r, {seen[r].begin > common.end ? seen[r].begin : common.end, seen[r].end});
  }
}

template <class W, class V>
inline void attend_tile(const AttentionParams& p, AttentionBlock& block, KeyRange tile) {
  for_each_rows<kRowsAtOnce>(0, block.rows, [&](int64_t i, auto rows) {
    dot_rows<W, decltype(rows)::kCount>(block, i, tile.end - tile.begin);
  });
  for_each_rows<kRowsAtOnce>(0, block.rows,
                             [&](int64_t i, auto rows) { attend_rows<V, decltype(rows)::kCount>(p, block, i, tile); });
}

/// What turns row i's sums into its result: 1 over the mass of its keys and of its head's sink, relative to the peak.
inline Vec normaliser(const AttentionParams& p, const AttentionBlock& block, int64_t i, int64_t query_head) {
  const Vec one = broadcast(1.0f), mass = broadcast(reduce_add(load(block.mass + i * kLanes)));
  if (p.sinks == nullptr) return one / mass;
  const float sink = p.sinks[query_head], top = sink > block.peak[i] ? sink : block.peak[i];
  const Vec factor = exp(broadcast(block.peak[i] - top));
  return factor / (mass * factor + exp(broadcast(sink - top)));
}

template <class Q>
inline void store_outputs(const AttentionParams& p, int64_t begin, int64_t head, int64_t first,
                          const AttentionBlock& block) {
  const int64_t group = p.query_heads / p.kv_heads;
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t row = begin + (first + i) / group, query_head = head * group + (first + i) % group;
    Q* out = static_cast<Q*>(p.out) + (row * p.query_heads + query_head) * p.head_dim;
    const Vec inverse = normaliser(p, block, i, query_head);
    for_each_vector(p.head_dim, [&](int64_t d, int64_t n) {
      store_some(out + d, load(block.sum + i * block.width + d) * inverse, n);
    });
  }
}

/// All tiles that some row of the block sees. They begin at multiples of their size, whatever rows the block has.
template <class W, class T>
inline void attend_keys(const AttentionParams& p, int64_t sequence, int64_t head, AttentionBlock& block) {
  const int32_t* table = p.block_tables + sequence * p.table_stride;
  const int64_t begin = visible_keys(p, block.position[0]).begin / kTileKeys * kTileKeys;
  const int64_t end = visible_keys(p, block.position[block.rows - 1]).end;
  for (int64_t key = begin; key < end; key += kTileKeys) {
    const KeyRange tile = {key, key + kTileKeys < end ? key + kTileKeys : end};
    load_tile<T>(p, table, head, tile, block) ? attend_tile<W, float>(p, block, tile)
                                              : attend_tile<W, T>(p, block, tile);
  }
}

/// Packed rows [first, first + kBlockRows) of one sequence and KV head, as many as there are.
inline void attend_block(const AttentionParams& p, int64_t r, int64_t head, int64_t first, AttentionBlock& block) {
  const int64_t group = p.query_heads / p.kv_heads;
  const int64_t begin = p.query_start[r], rows = p.query_start[r + 1] - begin;
  if (first >= rows * group) return;
  block.rows = rows * group - first < kBlockRows ? rows * group - first : kBlockRows;
  block.width = (p.head_dim + kLanes - 1) / kLanes * kLanes;
  block.words = has_pairs(p) ? p.head_dim / 2 : p.head_dim;
  for (int64_t i = 0; i < block.rows; ++i) block.position[i] = p.context_lens[r] - rows + (first + i) / group;
  const bool narrow_q = p.q_dtype == DType::kBFloat16, narrow_cache = p.cache_dtype == DType::kBFloat16;
  narrow_q ? load_queries<BFloat16>(p, begin, head, first, block) : load_queries<float>(p, begin, head, first, block);
  if (has_pairs(p)) {
    if constexpr (kPairWords) attend_keys<BFloat16Weight, BFloat16>(p, r, head, block);
  } else if (narrow_cache) {
    attend_keys<Float32Weight, BFloat16>(p, r, head, block);
  } else {
    attend_keys<Float32Weight, float>(p, r, head, block);
  }
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
