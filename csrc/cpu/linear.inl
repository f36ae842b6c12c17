// linear: a few rows times a packed weight (LinearParams::weight), which is read once for all of them.
//
// A row of x is a list of 32-bit words: fp32 numbers, or pairs of bf16 where the hardware multiplies pairs. Sums are
// fp32. The order of additions depends on nothing but in_features: a row's result is the same to the bit whatever rows
// stand beside it, in a decoding step as in a verification, and whatever thread computes it.

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

/// The same in AMX's tiles, and in vectors what steps are left over.
template <class W>
inline void multiply_tiled_chunk(Words x, const char* weight, int64_t steps, float* sums) {
  const RowTiles tiles = row_tiles<W>(x.count);
  const int64_t whole = steps / kTileSteps * kTileSteps;
  for (int64_t tile = 0; tile < tiles.count; ++tile, sums += tiles.height * kPanelColumns) {
    const Words own = words_from(x, tiles.begin(tile), tiles.height, 0);
    const auto ahead = weights_ahead<W, kPanelParts, false>(weight, steps, 0, 1);
    TileRegisters<W::kTiled>::multiply(own, weight, whole, tile == 0, ahead, sums);
    const Words rest = words_from(own, 0, own.count, whole);
    if (whole < steps) multiply_chunk<W>(rest, weight + whole * W::kStepBytes, steps - whole, Whole{}, sums);
  }
}

/// Steps [begin, end) of a panel for all rows, in chunks that the caches keep from tile to tile.
template <class W, class T, class Join>
inline void multiply_steps(Words x, const char* weight, int64_t begin, int64_t end, Join join, float* sums) {
  constexpr int64_t kSteps = kChunkInputs<T> / W::kInputs;
  for (int64_t step = begin; step < end; step += kSteps) {
    const int64_t count = end - step < kSteps ? end - step : kSteps;
    const Words words = words_from(x, 0, x.count, step * W::kWords);
    if constexpr (W::kTiled) {
      multiply_tiled_chunk<W>(words, weight + step * W::kStepBytes, count, sums);
    } else {
      multiply_chunk<W>(words, weight + step * W::kStepBytes, count, join, sums);
    }
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

/// Where the sums of row `row`'s inputs in each group lie.
inline float* group_sums(const LinearParams& p, int64_t row) {
  return p.scratch + p.rows * linear_scratch_width(p.in_features) + row * linear_groups(p);
}

/// A panel whose groups of inputs have scales, and maybe offsets, of their own. x: rows from first_row on.
template <class W, class T>
inline void multiply_groups(const LinearParams& p, Words x, const char* weight, int64_t panel, int64_t first_row,
                            int64_t steps, float* sums) {
  const int64_t groups = linear_groups(p), group_steps = p.group / W::kInputs;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * group_steps, end = begin + group_steps < steps ? begin + group_steps : steps;
    const int64_t place = (panel * groups + group) * kPanelColumns;
    multiply_steps<W, T>(x, weight, begin, end, Scaled{p.scale + place}, sums);
    if (p.offset != nullptr) {
      add_offset(p.offset + place, group_sums(p, first_row) + group, groups, x.count, sums);
    }
  }
}

/// The sums, scaled and with the bias, as rows of the result.
template <class T>
inline void store_panel(const LinearParams& p, const float* sums, int64_t first_row, int64_t rows, int64_t column) {
  const int64_t columns = p.out_features - column < kPanelColumns ? p.out_features - column : kPanelColumns;
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t row = 0; row < rows; ++row) {
    T* out = static_cast<T*>(p.out) + (first_row + row) * p.out_features + column;
    for_each_vector(columns, [&](int64_t i, int64_t count) {
      Vec y = load(sums + row * kPanelColumns + i);
      if (p.format == WeightFormat::kInt8) y = y * load_some(p.scale + column + i, count);
      if (bias != nullptr) y = y + load_some(bias + column + i, count);
      store_some(out + i, y, count);
    });
  }
}

template <class W, class T>
void multiply_panels(const LinearParams& p, Words all, Range panels) {
  const int64_t steps = (p.in_features + W::kInputs - 1) / W::kInputs;
  PanelSums sums;
  TileRegisters<W::kTiled> registers;
  for (int64_t row = 0; row < p.rows; row += kLinearRows) {
    const Words x = words_from(all, row, p.rows - row < kLinearRows ? p.rows - row : kLinearRows, 0);
    const auto tiles = row_tiles<W>(x.count);
    registers.configure(tiles.height);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const char* weight = static_cast<const char*>(p.weight) + panel * steps * W::kStepBytes;
      for (int64_t i = 0; i < tiles.count * tiles.height * kPanelColumns; i += kLanes) {
        store(sums.sum + i, broadcast(0.0f));
      }
      if (p.group > 0) {
        multiply_groups<W, T>(p, x, weight, panel, row, steps, sums.sum);
      } else {
        multiply_steps<W, T>(x, weight, 0, steps, Whole{}, sums.sum);
      }
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const float* tile_sums = sums.sum + tile * tiles.height * kPanelColumns;
        store_panel<T>(p, tile_sums, row + tiles.begin(tile), tiles.height, panel * kPanelColumns);
      }
    }
  }
}

/// Whether x itself is the words of a product with W: no number needs to be widened, and no step lacks an input.
template <class W, class T>
inline bool reads_x(const LinearParams& p) {
  return W::kInputs * sizeof(T) == W::kWords * 4 && p.in_features % W::kInputs == 0;
}

template <class T>
void sum_groups(const LinearParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    float* sums = group_sums(p, row);
    for (int64_t begin = 0; begin < p.in_features; begin += p.group) {
      Vec sum = broadcast(0.0f);
      const int64_t inputs = p.in_features - begin < p.group ? p.in_features - begin : p.group;
      for_each_vector(inputs, [&](int64_t i, int64_t n) { sum = sum + load_some(x + begin + i, n); });
      *sums++ = reduce_add(sum);
    }
  }
}

/// Rows of scratch are widened rows of x where the words are fp32, else copies; zeros follow.
template <class W, class T>
void fill_scratch(const LinearParams& p) {
  if (p.offset != nullptr) sum_groups<T>(p);
  if (reads_x<W, T>(p)) return;
  const int64_t stride = linear_scratch_width(p.in_features);
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    auto* words = reinterpret_cast<typename W::Number*>(p.scratch + row * stride);
    for_each_vector(p.in_features, [&](int64_t i, int64_t n) { store_some(words + i, load_some(x + i, n), n); });
    for (int64_t i = p.in_features; i < stride; ++i) words[i] = {};
  }
}

template <class W, class T>
void linear_as(const LinearParams& p, Range panels) {
  const bool direct = reads_x<W, T>(p);
  const void* data = direct ? p.x : p.scratch;
  const int64_t stride =
      direct ? p.x_stride * static_cast<int64_t>(sizeof(T)) : linear_scratch_width(p.in_features) * 4;
  multiply_panels<W, T>(p, {static_cast<const char*>(data), p.rows, stride}, panels);
}

/// Calls use(W{}, T{}) with how the weight is read and the numbers' type.
template <class Use>
inline void for_weight(const LinearParams& p, Use use) {
  const bool fp32 = p.dtype == DType::kFloat32;
  switch (p.format) {
    case WeightFormat::kFull:
      return fp32 ? use(Float32Weight{}, float{}) : use(BFloat16Weight{}, BFloat16{});
    case WeightFormat::kGroupInt4:
      return fp32 ? use(Int4Weight{}, float{}) : use(Int4BFloat16Weight{}, BFloat16{});
    case WeightFormat::kInt8:
    case WeightFormat::kGroupInt8:
      return fp32 ? use(Int8Weight{}, float{}) : use(Int8BFloat16Weight{}, BFloat16{});
  }
}

void linear_rows(const LinearParams& p) {
  for_weight(p, [&](auto w, auto t) { fill_scratch<decltype(w), decltype(t)>(p); });
}

void linear(const LinearParams& p, Range panels) {
  for_weight(p, [&](auto w, auto t) { linear_as<decltype(w), decltype(t)>(p, panels); });
}

}  // namespace pearl::PEARL_ISA
