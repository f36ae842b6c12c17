// linear: a few rows times a packed weight (LinearParams::weight), which is read once for all of them.
//
// A step is one 32-bit word of a row of x, an fp32 number or a pair of bf16, and meets one word of every column. Sums
// are fp32. The order of additions depends on nothing but in_features: a row's result is the same to the bit whatever
// rows stand beside it, in a decoding step as in a verification.

namespace pearl::PEARL_ISA {

/// Steps of a panel that are summed up by themselves, because a sum of sums rounds less than one long sum. They stay in
/// the caches from one tile of rows to the next: 24 KB of fp32; 48 KB of bf16, whose result is rounded far coarser.
template <class T>
inline constexpr int64_t kChunkSteps = sizeof(T) == 4 ? 128 : 256;
inline constexpr int64_t kLinearRows = 64;  // summed up beside each other; more rows pass over the weight again

/// Sums of one panel, [rows, kPanelColumns].
struct alignas(64) PanelSums {
  float sum[kLinearRows * kPanelColumns];
};

/// Rows of x in bytes, so that a step is four of them whatever the type. They need not be aligned.
struct Rows {
  const char* data;
  int64_t count, stride;
};

inline Rows rows_from(Rows x, int64_t row, int64_t count, int64_t step) {
  return {x.data + row * x.stride + step * 4, count, x.stride};
}

inline Bits broadcast_step(const char* x) {
  uint32_t step;
  __builtin_memcpy(&step, x, sizeof step);
  return broadcast_bits(step);
}

inline Vec multiply_step(Bits w, Bits x, Vec sum, float) { return mul_add(float_of(w), float_of(x), sum); }
inline Vec multiply_step(Bits w, Bits x, Vec sum, BFloat16) { return dot_pairs(w, x, sum); }

/// sums += x @ weight for kTileVectors vectors of columns. Where arithmetic takes longer than memory, the hardware's
/// prefetcher stops too early: `ahead` > 0 asks for the words that many further on.
template <class T, int kRows>
inline void multiply_tile(Rows x, const uint32_t* weight, int64_t steps, int64_t ahead, float* sums) {
  Vec sum[kRows][kTileVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = broadcast(0.0f);
  }
  for (int64_t step = 0; step < steps; ++step, weight += kPanelColumns) {
    Bits w[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) {
      w[v] = load_bits(weight + v * kLanes);
      if (kRows >= 4 && ahead > 0) __builtin_prefetch(weight + v * kLanes + ahead, 0, 2);
    }
    for (int r = 0; r < kRows; ++r) {
      const Bits value = broadcast_step(x.data + r * x.stride + step * 4);
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] = multiply_step(w[v], value, sum[r][v], T{});
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kTileVectors; ++v) {
      float* total = sums + r * kPanelColumns + v * kLanes;
      store(total, load(total) + sum[r][v]);
    }
  }
}

/// multiply_tile of x.count rows, at most kRows.
template <class T, int kRows>
inline void multiply_rows(Rows x, const uint32_t* weight, int64_t steps, int64_t ahead, float* sums) {
  if constexpr (kRows > 0) {
    if (x.count < kRows) return multiply_rows<T, kRows - 1>(x, weight, steps, ahead, sums);
    for (int v = 0; v < kPanelColumns; v += kTileVectors * kLanes) {
      multiply_tile<T, kRows>(x, weight + v, steps, ahead, sums + v);
    }
  }
}

/// A chunk of a panel for all rows, in tiles of nearly equal height.
template <class T>
inline void multiply_chunk(Rows x, const uint32_t* weight, int64_t steps, float* sums) {
  for (int64_t row = 0, tiles = (x.count + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
    const int64_t count = (x.count - row + tiles - 1) / tiles;
    // The last tile fetches the next chunk, which the first one then finds in the cache.
    const int64_t ahead = tiles == 1 ? steps * kPanelColumns : 0;
    multiply_rows<T, kTileRows>(rows_from(x, row, count, 0), weight, steps, ahead, sums + row * kPanelColumns);
    row += count;
  }
}

/// The step of an odd in_features: the last number of each row beside a zero.
template <class T>
inline void multiply_rest(Rows x, const uint32_t* weight, float* sums) {
  uint32_t last[kLinearRows] = {};
  for (int64_t row = 0; row < x.count; ++row) __builtin_memcpy(last + row, x.data + row * x.stride, sizeof(T));
  multiply_chunk<T>({reinterpret_cast<const char*>(last), x.count, sizeof(uint32_t)}, weight, 1, sums);
}

template <class T>
inline void store_panel(const LinearParams& p, const float* sums, int64_t first_row, int64_t rows, int64_t column) {
  const int64_t columns = p.out_features - column < kPanelColumns ? p.out_features - column : kPanelColumns;
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t row = 0; row < rows; ++row) {
    T* out = static_cast<T*>(p.out) + (first_row + row) * p.out_features + column;
    for_each_vector(columns, [&](int64_t i, int64_t count) {
      const Vec sum = load(sums + row * kPanelColumns + i);
      store_some(out + i, bias == nullptr ? sum : sum + load_some(bias + column + i, count), count);
    });
  }
}

template <class T>
void linear_panels(const LinearParams& p) {
  constexpr int64_t kElements = sizeof(uint32_t) / sizeof(T);
  const int64_t whole = p.in_features / kElements, steps = (p.in_features + kElements - 1) / kElements;
  const Rows all = {static_cast<const char*>(p.x), p.rows, p.x_stride * static_cast<int64_t>(sizeof(T))};
  PanelSums sums;
  for (int64_t row = 0; row < p.rows; row += kLinearRows) {
    const Rows x = rows_from(all, row, p.rows - row < kLinearRows ? p.rows - row : kLinearRows, 0);
    const auto* weight = static_cast<const uint32_t*>(p.weight);
    for (int64_t column = 0; column < p.out_features; column += kPanelColumns, weight += steps * kPanelColumns) {
      for (int64_t i = 0; i < x.count * kPanelColumns; i += kLanes) store(sums.sum + i, broadcast(0.0f));
      for (int64_t step = 0; step < whole; step += kChunkSteps<T>) {
        const int64_t count = whole - step < kChunkSteps<T> ? whole - step : kChunkSteps<T>;
        multiply_chunk<T>(rows_from(x, 0, x.count, step), weight + step * kPanelColumns, count, sums.sum);
      }
      if (whole < steps) multiply_rest<T>(rows_from(x, 0, x.count, whole), weight + whole * kPanelColumns, sums.sum);
      store_panel<T>(p, sums.sum, row, x.count, column);
    }
  }
}

void linear(const LinearParams& p) {
  p.dtype == DType::kFloat32 ? linear_panels<float>(p) : linear_panels<BFloat16>(p);
}

}  // namespace pearl::PEARL_ISA
