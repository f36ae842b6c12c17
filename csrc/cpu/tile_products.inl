// linear's products in AMX's registers: tiles of up to 16 rows of 16 words (pairs of bf16), times tiles of 16 steps of
// a part of the columns. The weight's steps are such tiles as they lie, one a part, and rows of x too.

namespace pearl::PEARL_ISA {

/// Rows of x as words. They need not be aligned.
struct Words {
  const char* data;
  int64_t count, stride;  // rows; bytes from one to the next
};

inline Words words_from(Words x, int64_t row, int64_t count, int64_t word) {
  return {x.data + row * x.stride + word * 4, count, x.stride};
}

/// Rows of x in tiles of the same height, so that one configuration of the registers serves all of them. The last one
/// begins earlier instead of being lower, and computes again what the one before has.
struct RowTiles {
  int64_t rows, count, height;

  RowTiles(int64_t n, int64_t most) : rows(n), count((n + most - 1) / most), height((n + count - 1) / count) {}
  int64_t begin(int64_t tile) const { return tile + 1 < count ? tile * height : rows - height; }
};

inline constexpr int64_t kMostTileRows = 16, kTileSteps = 16, kPanelStride = 4 * kPanelColumns;
inline constexpr int64_t kTilesAhead = 6 << 10;  // bytes that weights are asked for before they are multiplied

inline PartBits broadcast_word(const char* x) {
  uint32_t word;
  __builtin_memcpy(&word, x, sizeof word);
  return broadcast_part(word);
}

#ifdef PEARL_TILES

/// GCC 12's instructions do not say that they read and write memory: what comes before must have been stored, and what
/// comes after must be loaded.
inline void memory_is_used() { asm volatile("" ::: "memory"); }

/// Asks for a part of the columns of a tile of steps to come.
template <bool kAsk>
inline void ask_for_part(const char* weight) {
  if constexpr (!kAsk) return;
  for (int64_t step = 0; step < kTileSteps; ++step) {
    __builtin_prefetch(weight + kTilesAhead + step * kPanelStride, 0, 3);
  }
}

/// sums (+)= x @ weight for a tile of rows and `steps` steps, a multiple of kTileSteps. kAdd: to what sums are. kAsk:
/// it asks for the weights to come, as the first of several tiles of rows does for all.
template <bool kAdd, bool kAsk>
inline void multiply_row_tile(Words x, const char* weight, int64_t steps, float* sums) {
  static_assert(kPanelParts == 3, "a register each");
  memory_is_used();
  if constexpr (kAdd) {
    _tile_loadd(0, sums, kPanelStride);
    _tile_loadd(1, sums + kPartLanes, kPanelStride);
    _tile_loadd(2, sums + 2 * kPartLanes, kPanelStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
  }
  const char* words = x.data;
  for (int64_t step = 0; step < steps;
       step += kTileSteps, words += 4 * kTileSteps, weight += kTileSteps * kPanelStride) {
    _tile_loadd(3, words, x.stride);
    ask_for_part<kAsk>(weight);
    _tile_loadd(4, weight, kPanelStride);
    _tile_dpbf16ps(0, 3, 4);
    ask_for_part<kAsk>(weight + kLineBytes);
    _tile_loadd(5, weight + kLineBytes, kPanelStride);
    _tile_dpbf16ps(1, 3, 5);
    ask_for_part<kAsk>(weight + 2 * kLineBytes);
    _tile_loadd(6, weight + 2 * kLineBytes, kPanelStride);
    _tile_dpbf16ps(2, 3, 6);
  }
  _tile_stored(0, sums, kPanelStride);
  _tile_stored(1, sums + kPartLanes, kPanelStride);
  _tile_stored(2, sums + 2 * kPartLanes, kPanelStride);
  memory_is_used();
}

/// The same to the bit for one row, in vectors, which wait less for memory: TDPBF16PS sums up the first numbers of 16
/// pairs, the second ones apart, and then adds both sums' sum. Only a sum that is subnormal would differ.
template <class Ahead>
inline void multiply_row_as_tile(Words x, const char* weight, int64_t steps, Ahead ahead, float* sums) {
  const char* words = x.data;
  for (int64_t begin = 0; begin < steps; begin += kTileSteps) {
    Part first[kPanelParts], second[kPanelParts];
    for (int i = 0; i < kPanelParts; ++i) first[i] = second[i] = zero_part();
    for (int64_t step = 0; step < kTileSteps; ++step, weight += kPanelStride, words += 4) {
      ahead.ask();
      const PartBits pair = broadcast_word(words);
      const PartBits left = pair & broadcast_bits(0xFFFF), right = pair & broadcast_bits(0xFFFF0000);
      for (int i = 0; i < kPanelParts; ++i) {
        const PartBits w = load_part(reinterpret_cast<const uint32_t*>(weight) + i * kPartLanes);
        first[i] = dot_pairs(w, left, first[i]);
        second[i] = dot_pairs(w, right, second[i]);
      }
    }
    for (int i = 0; i < kPanelParts; ++i) {
      store(sums + i * kPartLanes, load_part(sums + i * kPartLanes) + (first[i] + second[i]));
    }
  }
}

#endif

/// AMX's registers while they are used: as they are configured, and given back at the end.
template <bool kTiled>
struct TileRegisters {
  void configure(int64_t) {}
};

#ifdef PEARL_TILES

template <>
struct TileRegisters<true> {
  TileRegisters() = default;
  TileRegisters(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }

  /// 0, 1, 2: sums of `height` rows and a panel's three parts; 3: words of the rows; 4, 5, 6: steps of the weight.
  void configure(int64_t height) {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 7; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = static_cast<uint8_t>(i < 4 ? height : kTileSteps);
    }
    memory_is_used();
    _tile_loadconfig(&config);
  }
};

#endif

}  // namespace pearl::PEARL_ISA
