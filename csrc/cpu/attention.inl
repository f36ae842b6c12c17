// verify_attention: online softmax over the pages of one KV head, for all the query rows that read it.
//
// The rows of a sequence and the heads of a GQA group are packed into one list: packed row t is query row t / group,
// head t % group. A block of packed rows walks over the keys tile by tile, so that decoding and verification read every
// page once. Tiles are widened to fp32 and padded with zeros to whole vectors; what follows has no special cases.

namespace pearl::PEARL_ISA {

inline constexpr int64_t kTileKeys = 32;
inline constexpr int64_t kBlockRows = 64;

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

/// Keys [begin, end) of one sequence and head that a row may see.
struct KeyRange {
  int64_t begin, end;
};

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

template <class T>
inline void load_tile(const AttentionParams& p, const int32_t* table, int64_t head, KeyRange keys,
                      AttentionBlock& block) {
  for (int64_t key = keys.begin; key < keys.end; ++key) {
    const int64_t slot = table[key / p.page_size] * p.page_size + key % p.page_size;
    const int64_t offset = (slot * p.kv_heads + head) * p.head_dim, to = (key - keys.begin) * block.width;
    widen_row(static_cast<const T*>(p.k_cache) + offset, p.head_dim, block.k + to);
    widen_row(static_cast<const T*>(p.v_cache) + offset, p.head_dim, block.v + to);
  }
  // Scores are made sixteen keys at a time. The surplus is masked, but must be finite.
  for (int64_t i = keys.end - keys.begin; i % kLanes != 0; ++i) {
    for (int64_t d = 0; d < block.width; d += kLanes) store(block.k + i * block.width + d, broadcast(0.0f));
  }
}

inline Vec dot_sixteen(const float* q, const float* k, int64_t width) {
  Vec partial[kLanes];
  const Vec first = load(q);
  for (int i = 0; i < kLanes; ++i) partial[i] = first * load(k + i * width);
  for (int64_t d = kLanes; d < width; d += kLanes) {
    const Vec chunk = load(q + d);
    for (int i = 0; i < kLanes; ++i) partial[i] = mul_add(chunk, load(k + i * width + d), partial[i]);
  }
  return sum_each(partial);
}

/// Scores of row i against the tile, turned into probabilities; returns the factor that brings the row's earlier sums
/// to the new peak. `seen` are the keys of the tile that the row sees, at least one.
inline float score_row(const AttentionParams& p, AttentionBlock& block, int64_t i, KeyRange seen) {
  float* score = block.score + i * kTileKeys;
  Vec top = broadcast(kMinusInfinity);
  for (int64_t j = 0; j < seen.end; j += kLanes) {
    Vec s = dot_sixteen(block.q + i * block.width, block.k + j * block.width, block.width);
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
  const float rescale = block.peak[i] == kMinusInfinity ? 0.0f : reduce_max(exp(broadcast(block.peak[i] - peak)));
  block.peak[i] = peak;
  block.mass[i] = block.mass[i] * rescale + reduce_add(mass);
  return rescale;
}

/// sum = sum * rescale + probabilities @ v, kChunks vectors of the head at a time.
template <int kChunks>
inline void accumulate(AttentionBlock& block, int64_t i, KeyRange seen, float rescale, int64_t d) {
  float* sum = block.sum + i * block.width + d;
  const float* probability = block.score + i * kTileKeys;
  Vec total[kChunks];
  for (int c = 0; c < kChunks; ++c) total[c] = load(sum + c * kLanes) * broadcast(rescale);
  for (int64_t j = seen.begin; j < seen.end; ++j) {
    const Vec weight = broadcast(probability[j]);
    const float* v = block.v + j * block.width + d;
    for (int c = 0; c < kChunks; ++c) total[c] = mul_add(weight, load(v + c * kLanes), total[c]);
  }
  for (int c = 0; c < kChunks; ++c) store(sum + c * kLanes, total[c]);
}

inline void attend_tile(const AttentionParams& p, AttentionBlock& block, KeyRange tile) {
  for (int64_t i = 0; i < block.rows; ++i) {
    const KeyRange keys = visible_keys(p, block.position[i]);
    const KeyRange seen = {keys.begin > tile.begin ? keys.begin - tile.begin : 0,
                           (keys.end < tile.end ? keys.end : tile.end) - tile.begin};
    if (seen.begin >= seen.end) continue;
    const float rescale = score_row(p, block, i, seen);
    int64_t d = 0;
    for (; d + 4 * kLanes <= block.width; d += 4 * kLanes) accumulate<4>(block, i, seen, rescale, d);
    for (; d < block.width; d += kLanes) accumulate<1>(block, i, seen, rescale, d);
  }
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

/// All tiles that some row of the block sees.
template <class T>
inline void attend_keys(const AttentionParams& p, int64_t sequence, int64_t head, AttentionBlock& block) {
  const int32_t* table = p.block_tables + sequence * p.table_stride;
  const int64_t end = visible_keys(p, block.position[block.rows - 1]).end;
  for (int64_t key = visible_keys(p, block.position[0]).begin; key < end; key += kTileKeys) {
    const KeyRange tile = {key, key + kTileKeys < end ? key + kTileKeys : end};
    load_tile<T>(p, table, head, tile, block);
    attend_tile(p, block, tile);
  }
}

void verify_attention(const AttentionParams& p) {
  AttentionBlock block;
  block.width = (p.head_dim + kLanes - 1) / kLanes * kLanes;
  const int64_t group = p.query_heads / p.kv_heads;
  const bool narrow_q = p.q_dtype == DType::kBFloat16, narrow_cache = p.cache_dtype == DType::kBFloat16;
  for (int64_t r = 0; r < p.sequences; ++r) {
    const int64_t begin = p.query_start[r], rows = p.query_start[r + 1] - begin;
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      for (int64_t first = 0; first < rows * group; first += kBlockRows) {
        block.rows = rows * group - first < kBlockRows ? rows * group - first : kBlockRows;
        for (int64_t i = 0; i < block.rows; ++i) block.position[i] = p.context_lens[r] - rows + (first + i) / group;
        narrow_q ? load_queries<BFloat16>(p, begin, head, first, block)
                 : load_queries<float>(p, begin, head, first, block);
        narrow_cache ? attend_keys<BFloat16>(p, r, head, block) : attend_keys<float>(p, r, head, block);
        narrow_q ? store_outputs<BFloat16>(p, begin, head, first, block)
                 : store_outputs<float>(p, begin, head, first, block);
      }
    }
  }
}

}  // namespace pearl::PEARL_ISA
