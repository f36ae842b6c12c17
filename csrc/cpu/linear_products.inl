// linear's products: a chunk of a panel of the weight for all rows, and how its sums join those of the panel.

namespace pearl::PEARL_ISA {

inline constexpr int64_t kLinearRows = 64;  // summed up beside each other; more rows pass over the weight again

/// Inputs that are summed up by themselves, because a sum of sums rounds less than one long sum. Their weights stay in
/// the caches from one tile of rows to the next. A bf16 result is rounded far coarser.
template <class T>
inline constexpr int64_t kChunkInputs = sizeof(T) == 4 ? 128 : kNarrowChunkInputs;

/// Sums of one panel, [rows, kPanelColumns].
struct alignas(64) PanelSums {
  float sum[kLinearRows * kPanelColumns];
};

/// Rows that are summed up together: all, or as many as a register of AMX takes.
template <class W>
inline RowTiles row_tiles(int64_t rows) {
  return {rows, W::kTiled ? kMostTileRows : kLinearRows};
}

/// sum[r][i] += weight * x for one word of each row and kParts parts of columns. The operands that are fewer stay in
/// registers while the others pass by.
template <class W, int kRows, int kParts>
inline void multiply_word(const char* words, int64_t stride, const char* weight, int first, int word,
                          Part (&sum)[kRows][kParts]) {
  if constexpr (kRows < kParts) {
    PartBits value[kRows];
    for (int r = 0; r < kRows; ++r) value[r] = broadcast_word(words + r * stride);
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      const auto w = W::operand(weight, first + i, word);
      for (int r = 0; r < kRows; ++r) sum[r][i] = W::multiply(w, value[r], sum[r][i]);
    }
  } else {
    typename W::Operand w[kParts];
    for (int i = 0; i < kParts; ++i) w[i] = W::operand(weight, first + i, word);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const PartBits value = broadcast_word(words + r * stride);
      for (int i = 0; i < kParts; ++i) sum[r][i] = W::multiply(w[i], value, sum[r][i]);
    }
  }
}

/// How a tile's sums join those of the panel: as they are.
struct Whole {
  static constexpr bool kGroups = false;
  Part join(Part total, Part sum, int) const { return total + sum; }
};

/// Those of inputs that share a scale, [kPanelColumns].
struct Scaled {
  static constexpr bool kGroups = true;
  const float* scale;
  Part join(Part total, Part sum, int column) const { return mul_add(sum, load_part(scale + column), total); }
};

/// One chunk of a panel for kRows rows and kParts parts of columns: sums += x @ weight. Every step asks for some of the
/// weights to come.
template <class W, int kRows, int kParts, class Ahead, class Join>
inline void multiply_tile(Words x, const char* weight, int first, int64_t steps, Ahead ahead, Join join, float* sums) {
  Part sum[kRows][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kParts; ++i) sum[r][i] = zero_part();
  }
  const char* words = x.data;
  for (int64_t step = 0; step < steps; ++step, weight += W::kStepBytes, words += 4 * W::kWords) {
    ahead.ask();
    multiply_word<W>(words, x.stride, weight, first, 0, sum);
#pragma GCC unroll 8
    for (int word = 1; word < W::kWords; ++word) {
      asm volatile("" ::: "memory");  // the weight is loaded again: no register is free to keep it
      multiply_word<W>(words + 4 * word, x.stride, weight, first, word, sum);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kParts; ++i) {
      const int column = (first + i) * kPartLanes;
      float* total = sums + r * kPanelColumns + column;
      store(total, join.join(load_part(total), sum[r][i], column));
    }
  }
}

/// multiply_tile of all columns of the panel for x.count rows, at most kRows: one of `tiles` that share the
/// prefetching.
template <class W, int kRows, class Join>
inline void multiply_rows(Words x, const char* weight, int64_t steps, int64_t tile, int64_t tiles, Join join,
                          float* sums) {
  if constexpr (kRows > 0) {
    if (x.count < kRows) return multiply_rows<W, kRows - 1>(x, weight, steps, tile, tiles, join, sums);
    constexpr int kParts = tile_parts(kRows), kPasses = kPanelParts / kParts;
    static_assert(kPanelParts % kParts == 0, "a panel is a whole number of tiles");
    for (int pass = 0; pass < kPasses; ++pass) {
      const auto ahead = weights_ahead<W, kParts, Join::kGroups>(weight, steps, tile * kPasses + pass, tiles * kPasses);
      multiply_tile<W, kRows, kParts>(x, weight, pass * kParts, steps, ahead, join, sums);
    }
  }
}

/// A chunk of a panel for all rows, in tiles of nearly equal height.
template <class W, class Join>
inline void multiply_chunk(Words x, const char* weight, int64_t steps, Join join, float* sums) {
  const int64_t tiles = (x.count + kTileRows - 1) / kTileRows;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = tile * x.count / tiles, count = (tile + 1) * x.count / tiles - row;
    float* tile_sums = sums + row * kPanelColumns;
    multiply_rows<W, kTileRows>(words_from(x, row, count, 0), weight, steps, tile, tiles, join, tile_sums);
  }
}

/// sums += offset * the sum of each row's inputs in the group.
inline void add_offset(const float* offset, const float* inputs, int64_t stride, int64_t rows, float* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    const Vec all = broadcast(inputs[row * stride]);
    for (int64_t i = 0; i < kPanelColumns; i += kLanes) {
      float* sum = sums + row * kPanelColumns + i;
      store(sum, mul_add(all, load(offset + i), load(sum)));
    }
  }
}

/// sums = join(sums, product) for `rows` rows.
template <class Join>
inline void join_rows(const float* product, int64_t rows, Join join, float* sums) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int i = 0; i < kPanelColumns; i += kPartLanes, product += kPartLanes, sums += kPartLanes) {
      store(sums, join.join(load_part(sums), load_part(product), i));
    }
  }
}

/// Where the sums of row `row`'s inputs in each group lie.
inline float* group_sums(const LinearParams& p, int64_t row) {
  return p.scratch + p.rows * linear_scratch_width(p.in_features) + row * linear_groups(p);
}

}  // namespace pearl::PEARL_ISA
