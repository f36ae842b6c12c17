/// What a forward leaves: logits, also those of a head that has only some of the ids, and hidden states.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "cpu/decoder.h"
#include "cpu/dtype.h"

namespace pearl {
namespace {

/// Each of `rows` rows of `own`, `columns` numbers wide, to the columns `ids` of a row of `out`; else that is -inf.
template <class Bits>
void spread(const void* own, int64_t rows, int64_t columns, const int64_t* ids, Bits minus_infinity, int64_t width,
            void* out) {
  for (int64_t row = 0; row < rows; ++row) {
    const Bits* from = static_cast<const Bits*>(own) + row * columns;
    Bits* to = static_cast<Bits*>(out) + row * width;
    std::fill_n(to, width, minus_infinity);
    for (int64_t i = 0; i < columns; ++i) to[ids[i]] = from[i];
  }
}

}  // namespace

/// Rows without logits are dropped first, unless their last hidden states or outputs are wanted: those with logits move
/// to the front.
void Decoder::write_logits(const DecoderBatch& batch) {
  const int64_t bytes = shape_.hidden * bytes_of(shape_.dtype), last = static_cast<int64_t>(layers_.size());
  const bool whole = keeps(last, batch) || batch.outputs != nullptr;
  if (whole) {
    enter(head_.norm, true, batch.tokens);
    keep(last, normed_.data(), 1.0f, batch);
  }
  if (batch.outputs != nullptr) {
    std::memcpy(batch.outputs, residual_.data(), static_cast<size_t>(batch.tokens * bytes));
  }
  for (int64_t i = 0; i < batch.num_logits; ++i) {
    const int64_t row = batch.logits_rows[i];
    if (row < i) throw std::invalid_argument("decoder: logits_rows must rise");
    for (std::vector<uint8_t>* rows : {&residual_, &sublayer_, &normed_}) {
      if ((rows == &normed_) == whole) std::memmove(rows->data() + i * bytes, rows->data() + row * bytes, bytes);
    }
  }
  if (batch.num_logits == 0) return;
  if (!whole) enter(head_.norm, true, batch.num_logits);
  project_head(batch);
  if (shape_.logits_scale != 1.0f || shape_.logits_softcap > 0) {
    parallel::scale_and_cap(*threads_, {shape_.dtype, batch.num_logits, shape_.vocab_size, batch.logits,
                                        shape_.vocab_size, shape_.logits_scale, shape_.logits_softcap});
  }
}

/// Of the normed rows at the front.
void Decoder::project_head(const DecoderBatch& batch) {
  const int64_t columns = head_.matrix.out_features, rows = batch.num_logits, width = shape_.vocab_size;
  if (head_.ids == nullptr) return project(head_.matrix, normed_.data(), batch.logits, rows);
  own_logits_.resize(static_cast<size_t>(rows * columns * bytes_of(shape_.dtype)));
  project(head_.matrix, normed_.data(), own_logits_.data(), rows);
  if (shape_.dtype == DType::kFloat32) {
    spread<uint32_t>(own_logits_.data(), rows, columns, head_.ids, 0xFF800000, width, batch.logits);
  } else {
    spread<uint16_t>(own_logits_.data(), rows, columns, head_.ids, 0xFF80, width, batch.logits);
  }
}

bool Decoder::keeps(int64_t layer, const DecoderBatch& batch) const {
  const int64_t* end = batch.hidden.layers + batch.hidden.count;
  return std::find(batch.hidden.layers, end, layer) != end;
}

/// Copies `states` [N, hidden], times `scale`, where the caller wants those of `layer`.
void Decoder::keep(int64_t layer, const uint8_t* states, float scale, const DecoderBatch& batch) const {
  const HiddenView& hidden = batch.hidden;
  const int64_t bytes = shape_.hidden * bytes_of(shape_.dtype);
  for (int64_t place = 0; place < hidden.count; ++place) {
    if (hidden.layers[place] != layer) continue;
    for (int64_t i = 0; i < batch.tokens; ++i) {
      uint8_t* out = static_cast<uint8_t*>(hidden.rows) + (i * hidden.count + place) * bytes;
      std::memcpy(out, states + i * bytes, static_cast<size_t>(bytes));
    }
    if (scale != 1.0f) {
      parallel::scale_and_cap(
          *threads_, {shape_.dtype, batch.tokens, shape_.hidden, static_cast<uint8_t*>(hidden.rows) + place * bytes,
                      hidden.count * shape_.hidden, scale, 0.0f});
    }
  }
}

}  // namespace pearl
