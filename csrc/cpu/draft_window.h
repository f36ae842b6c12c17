// A window drafted in one call: forward, draw, forward, draw, ... without Python, and so without the GIL, in between.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/decoder.h"
#include "pearl/params.h"

namespace pearl {

/// A sequence that begins when `parent` has drawn its first token: with `token`, or, if that is negative, with the
/// alternative of `rank` to what was drawn. `state`: the row of the states that its token was drawn from, of one whose
/// token is known and whose decoder reads features.
struct LateBranch {
  int64_t parent, rank, token, state;
};

/// Where the outputs that tokens were drawn from are kept by a decoder that reads features: they are those of the
/// tokens' rows. The one of the token at position p is row base + p % size of `rows`.
struct StatesView {
  void* rows;  // [count, hidden]
  int64_t count;
  const int64_t* base;  // [R]
  const int64_t* size;  // [R]
};

/// What is drafted after a forward, whose batch has F sequences. Late branches follow them: R = F + num_late sequences
/// in all, for which the batch has block tables and context_lens, though the forward computes nothing of the late ones.
/// Of a decoder that reads features, what it computes at position p is of the token at p + 1: positions of tokens are a
/// place behind those of the batch.
struct DraftWindow {
  const int64_t* num_draft;  // [R]; 0: the sequence only took part in the forward. A late one's own token counts
  int64_t longest;           // no num_draft is larger
  SamplingView sampling;     // [R]
  int64_t vocab_size;        // so many columns of the logits are drawn from
  uint32_t stream;
  void* ring;  // [ring_rows, the decoder's vocab_size], where logits of drafted tokens are kept
  int64_t ring_rows;
  const int64_t* ring_base;  // [R]; the token at position p goes to row ring_base + p % ring_size; negative: to none
  const int64_t* ring_size;  // [R]
  const LateBranch* late;    // [num_late]
  int64_t num_late;
  const int64_t* late_copies;  // [num_late_copies, 2]: pages copied after the forward, source and destination
  int64_t num_late_copies;
  int64_t* tokens;  // [R, longest], written up to num_draft; a late one's first is its own, -1: there was none
  float* logprobs;  // [R, longest]
  AlternativesView alternatives;  // [R, longest, count] and [R, longest], written as drawn tokens are
  StatesView states;              // of a decoder that reads features
};

/// Belongs to its decoder's thread. What it gives is, to the bit, what the decoder and `sample` give token by token.
class WindowDrafter {
 public:
  explicit WindowDrafter(Decoder& decoder) : decoder_(decoder) {}

  /// Computes `first`, then drafts. The batch asks for the logits of the last token of each sequence that drafts, and
  /// for no others; its block tables reach as far as the windows. first.logits is scratch memory afterwards.
  /// Throws std::invalid_argument, before anything is written, if an index is out of range.
  void draft(const DecoderBatch& first, const DraftWindow& window);

 private:
  void check(const DecoderBatch& first, const DraftWindow& window) const;
  void check_sequence(const DecoderBatch& first, const DraftWindow& window, int64_t sequence) const;
  void check_late(const DecoderBatch& first, const DraftWindow& window) const;
  void drop_ended(const DecoderBatch& first, const DraftWindow& window, int64_t step);
  void begin_late(const DecoderBatch& first, const DraftWindow& window);
  void compute(DecoderBatch batch, const DecoderBatch& first, const DraftWindow& window, int64_t step);
  uint8_t* state_of(const DraftWindow& window, int64_t sequence, int64_t position) const;
  void check_states(const DraftWindow& window, int64_t sequence) const;
  int64_t token_position(const DecoderBatch& first, int64_t sequence, int64_t step) const;
  void gather_tables(const DecoderBatch& first);
  void draw(const DecoderBatch& first, const DraftWindow& window, int64_t step);
  AlternativesView alternatives_of(int64_t rows, int64_t count);
  void keep_alternatives(const AlternativesView& all, int64_t row, int64_t place) const;
  void keep_logits(const DecoderBatch& first, const DraftWindow& window, int64_t row, int64_t position) const;
  DecoderBatch next(const DecoderBatch& first, const DraftWindow& window, int64_t step);

  Decoder& decoder_;
  std::vector<int64_t> drafting_;  // sequences, in order, a row each in what follows

  std::vector<float> temperature_, top_p_, min_p_, logprobs_;
  std::vector<int32_t> top_k_;
  std::vector<int64_t> seed_, positions_, drawn_;
  std::vector<int64_t> alternative_tokens_;
  std::vector<float> alternative_scores_, drawn_scores_;

  std::vector<uint8_t> outputs_, features_;  // of the latest forward; of the next one
  std::vector<int64_t> input_ids_, slots_, rows_;
  std::vector<int32_t> tables_, starts_, contexts_;
};

}  // namespace pearl
