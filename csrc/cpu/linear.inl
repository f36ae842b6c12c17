// linear: a few rows times a packed weight (LinearParams::weight), which is read once for all of them.
//
// A row of x is a list of 32-bit words: fp32 numbers, or pairs of bf16 where the hardware multiplies pairs. Sums are
// fp32. The order of additions depends on nothing but in_features: a row's result is the same to the bit whatever rows
// stand beside it, in a decoding step as in a verification, and whatever thread computes it.

namespace pearl::PEARL_ISA {

/// Steps [begin, end) of a panel for all rows, in chunks that the caches keep from tile to tile.
template <class W, class T, class Join>
inline void multiply_steps(Words x, const char* weight, int64_t begin, int64_t end, Join join, float* sums) {
  constexpr int64_t kSteps = kChunkInputs<T> / W::kInputs;
  for (int64_t step = begin; step < end; step += kSteps) {
    const int64_t count = end - step < kSteps ? end - step : kSteps;
    const Words words = words_from(x, 0, x.count, step * W::kWords);
    multiply_chunk<W>(words, weight + step * W::kStepBytes, count, join, sums);
  }
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
      if constexpr (W::kTiled) {
        multiply_tiled<W>(p, x, tiles, weight, panel, row, steps, sums.sum);
      } else if (p.group > 0) {
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
