// A panel of linear in AMX's tiles: matrices of bf16 as they lie, those of fewer bits decoded into pairs.

namespace pearl::PEARL_ISA {

/// A panel for the rows of x, of which the first is `first_row`: sums += x @ weight, tile of rows after tile of rows.
template <class W>
void multiply_tiled(const LinearParams& p, Words x, RowTiles tiles, const char* weight, int64_t panel,
                    int64_t first_row, int64_t steps, float* sums);

#ifdef PEARL_TILES

/// `steps` steps of few bits as BFloat16Weight's.
template <class W, class Ahead>
inline void decode_pairs(const char* weight, int64_t steps, Ahead ahead, char* pairs) {
  for (int64_t step = 0; step < steps; ++step, weight += W::kStepBytes) {
    ahead.ask();
#pragma GCC unroll 8
    for (int word = 0; word < W::kWords; ++word, pairs += kPanelStride) {
      for (int part = 0; part < kPanelParts; ++part) {
        store_bits(reinterpret_cast<uint32_t*>(pairs) + part * kPartLanes, W::operand(weight, part, word));
      }
    }
  }
}

/// Steps [begin, end) of a panel, of one group of inputs and at most a chunk; the steps before `whole` are whole tiles.
template <class W>
struct Piece {
  int64_t begin, end, whole;

  static constexpr int64_t kTile = kTileSteps / W::kWords, kMost = kNarrowChunkInputs / W::kInputs;

  Piece(int64_t first, int64_t steps, int64_t group_steps) : begin(first) {
    const int64_t group_end = (first / group_steps + 1) * group_steps;
    end = first + kMost < group_end ? first + kMost : group_end;
    if (end > steps) end = steps;
    whole = begin + (end - begin) / kTile * kTile;
  }

  /// Fewer bits in `room`; others where they lie.
  template <bool kGroups>
  const char* pairs(const char* weight, char* room) const {
    const char* first = weight + begin * W::kStepBytes;
    if constexpr (!W::kDecoded) return first;
    decode_pairs<W>(first, whole - begin, weights_ahead<W, kPanelParts, kGroups>(first, end - begin, 0, 1), room);
    return room;
  }
};

/// sums = join(sums, x @ piece) for all rows.
template <class W, class Join>
inline void multiply_piece(Words x, RowTiles tiles, Piece<W> piece, const char* weight, const char* pairs, Join join,
                           float* sums) {
  alignas(64) float product[kMostTileRows * kPanelColumns];
  const char* first = weight + piece.begin * W::kStepBytes;
  const int64_t words = (piece.whole - piece.begin) * W::kWords;
  for (int64_t tile = 0; tile < tiles.count; ++tile, sums += tiles.height * kPanelColumns) {
    const Words own = words_from(x, tiles.begin(tile), tiles.height, piece.begin * W::kWords);
    if constexpr (Join::kGroups) {
      multiply_row_tile<false, false>(own, pairs, words, product);
      join_rows(product, own.count, join, sums);
    } else if constexpr (W::kDecoded) {  // decoding has asked for the weights to come
      multiply_row_tile<true, false>(own, pairs, words, sums);
    } else if (own.count == 1) {
      const auto ahead = weights_ahead<W, kPanelParts, false>(first, piece.end - piece.begin, 0, 1);
      multiply_row_as_tile(own, pairs, words, ahead, sums);
    } else if (tile == 0) {
      multiply_row_tile<true, true>(own, pairs, words, sums);
    } else {
      multiply_row_tile<true, false>(own, pairs, words, sums);
    }
    if (piece.whole < piece.end) {
      const Words rest = words_from(own, 0, own.count, words);
      multiply_chunk<W>(rest, weight + piece.whole * W::kStepBytes, piece.end - piece.whole, join, sums);
    }
  }
}

/// A panel for all rows. Pieces are decoded one ahead: a tile that was just stored would be waited for.
template <class W, bool kGroups>
inline void multiply_pieces(const LinearParams& p, Words x, RowTiles tiles, const char* weight, int64_t panel,
                            int64_t first_row, int64_t steps, float* sums) {
  alignas(64) char room[2][W::kDecoded ? kNarrowChunkInputs * 2 * kPanelColumns : 1];
  const int64_t groups = kGroups ? linear_groups(p) : 1, group_steps = kGroups ? p.group / W::kInputs : steps;
  Piece<W> piece(0, steps, group_steps);
  const char* pairs = piece.template pairs<kGroups>(weight, room[0]);
  for (int64_t count = 1; piece.begin < steps; ++count) {
    const Piece<W> next(piece.end, steps, group_steps);
    const char* next_pairs = next.begin < steps ? next.template pairs<kGroups>(weight, room[count % 2]) : nullptr;
    if constexpr (kGroups) {
      const int64_t group = piece.begin / group_steps, place = (panel * groups + group) * kPanelColumns;
      multiply_piece(x, tiles, piece, weight, pairs, Scaled{p.scale + place}, sums);
      if (p.offset != nullptr && (piece.end == steps || piece.end % group_steps == 0)) {
        for (int64_t tile = 0; tile < tiles.count; ++tile) {
          const float* inputs = group_sums(p, first_row + tiles.begin(tile)) + group;
          add_offset(p.offset + place, inputs, groups, tiles.height, sums + tile * tiles.height * kPanelColumns);
        }
      }
    } else {
      multiply_piece(x, tiles, piece, weight, pairs, Whole{}, sums);
    }
    piece = next;
    pairs = next_pairs;
  }
}

template <class W>
void multiply_tiled(const LinearParams& p, Words x, RowTiles tiles, const char* weight, int64_t panel,
                    int64_t first_row, int64_t steps, float* sums) {
  if (p.group > 0) {
    multiply_pieces<W, true>(p, x, tiles, weight, panel, first_row, steps, sums);
  } else {
    multiply_pieces<W, false>(p, x, tiles, weight, panel, first_row, steps, sums);
  }
}

#endif

}  // namespace pearl::PEARL_ISA
