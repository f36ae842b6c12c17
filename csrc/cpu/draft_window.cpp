#include "cpu/draft_window.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/dtype.h"
#include "cpu/kernel_table.h"

namespace pearl {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("draft_window: " + what); }

void check_range(const char* what, int64_t value, int64_t begin, int64_t end) {
  if (value < begin || value >= end) {
    refuse(std::string(what) + " is " + std::to_string(value) + ", must be in [" + std::to_string(begin) + ", " +
           std::to_string(end) + ")");
  }
}

template <class T>
void gather(const T* values, const std::vector<int64_t>& indices, std::vector<T>& out) {
  out.clear();
  for (const int64_t index : indices) out.push_back(values[index]);
}

/// Whether sequences that are in order leave none out.
bool are_first(const std::vector<int64_t>& sequences) {
  return sequences.empty() || sequences.back() == static_cast<int64_t>(sequences.size()) - 1;
}

}  // namespace

void WindowDrafter::draft(const DecoderBatch& first, const DraftWindow& window) {
  check(first, window);
  drafting_.clear();
  for (int64_t sequence = 0; sequence < first.sequences; ++sequence) drafting_.push_back(sequence);
  drop_ended(first, window, 0);
  compute(first, first, window, 0);
  if (drafting_.empty()) return;
  draw(first, window, 0);
  decoder_.copy_pages(window.late_copies, window.num_late_copies);
  begin_late(first, window);
  for (int64_t step = 1;; ++step) {
    drop_ended(first, window, step);
    if (drafting_.empty()) return;
    compute(next(first, window, step), first, window, step);
    draw(first, window, step);
  }
}

/// A forward, and the outputs that this step's tokens are drawn from to where they are kept.
void WindowDrafter::compute(DecoderBatch batch, const DecoderBatch& first, const DraftWindow& window, int64_t step) {
  const int64_t bytes = decoder_.shape().hidden * bytes_of(decoder_.shape().dtype);
  const bool keeps = decoder_.reads_features();
  if (keeps && batch.outputs == nullptr) {
    outputs_.resize(static_cast<size_t>(batch.tokens * bytes));
    batch.outputs = outputs_.data();
  }
  decoder_.forward(batch);
  if (!keeps) return;
  for (size_t i = 0; i < drafting_.size(); ++i) {
    const auto* output = static_cast<const uint8_t*>(batch.outputs) + batch.logits_rows[i] * bytes;
    std::memcpy(state_of(window, drafting_[i], token_position(first, drafting_[i], step)), output, bytes);
  }
}

/// Of the token that a sequence draws in this step, in its text.
int64_t WindowDrafter::token_position(const DecoderBatch& first, int64_t sequence, int64_t step) const {
  return first.context_lens[sequence] + step + (decoder_.reads_features() ? 1 : 0);
}

/// Where the output is kept that the token at this position is drawn from.
uint8_t* WindowDrafter::state_of(const DraftWindow& window, int64_t sequence, int64_t position) const {
  const int64_t row = window.states.base[sequence] + position % window.states.size[sequence];
  return static_cast<uint8_t*>(window.states.rows) + row * decoder_.shape().hidden * bytes_of(decoder_.shape().dtype);
}

void WindowDrafter::drop_ended(const DecoderBatch& first, const DraftWindow& window, int64_t step) {
  const auto ended = [&](int64_t sequence) { return window.num_draft[sequence] <= step; };
  const auto end = std::remove_if(drafting_.begin(), drafting_.end(), ended);
  if (end != drafting_.end()) {
    drafting_.erase(end, drafting_.end());
    gather_tables(first);
  }
}

/// Late branches join those that draft, each with its own token, where its parent has such an alternative.
void WindowDrafter::begin_late(const DecoderBatch& first, const DraftWindow& window) {
  if (window.num_late == 0) return;
  const AlternativesView& all = window.alternatives;
  const int64_t bytes = decoder_.shape().hidden * bytes_of(decoder_.shape().dtype);
  for (int64_t i = 0; i < window.num_late; ++i) {
    const LateBranch& late = window.late[i];
    const int64_t sequence = first.sequences + i, place = late.parent * window.longest;
    const int64_t token = late.token >= 0 ? late.token : all.tokens[place * all.count + late.rank];
    window.tokens[sequence * window.longest] = token;
    if (token < 0) continue;
    drafting_.push_back(sequence);
    if (!decoder_.reads_features()) continue;
    const int64_t position = token_position(first, sequence, 0);
    const uint8_t* drawn_from = late.token >= 0 ? static_cast<const uint8_t*>(window.states.rows) + late.state * bytes
                                                : state_of(window, late.parent, position);
    std::memcpy(state_of(window, sequence, position), drawn_from, bytes);
  }
  gather_tables(first);
}

void WindowDrafter::check(const DecoderBatch& first, const DraftWindow& window) const {
  check_range("vocab_size", window.vocab_size, 1, decoder_.shape().vocab_size + 1);
  check_range("alternatives", window.alternatives.count, 0, kMostAlternatives + 1);
  int64_t drafting = 0;
  for (int64_t sequence = 0; sequence < first.sequences; ++sequence) {
    check_range("num_draft", window.num_draft[sequence], 0, window.longest + 1);
    if (window.num_draft[sequence] == 0) continue;
    const bool gives_last =
        drafting < first.num_logits && first.logits_rows[drafting] == first.query_start[sequence + 1] - 1;
    if (!gives_last) refuse("sequence " + std::to_string(sequence) + " drafts without its last row's logits");
    check_sequence(first, window, sequence);
    ++drafting;
  }
  if (drafting != first.num_logits) refuse("logits are asked for of a sequence that drafts nothing");
  check_late(first, window);
}

void WindowDrafter::check_late(const DecoderBatch& first, const DraftWindow& window) const {
  for (int64_t i = 0; i < window.num_late; ++i) {
    const int64_t sequence = first.sequences + i;
    check_range("a late branch's parent", window.late[i].parent, 0, first.sequences);
    if (window.num_draft[window.late[i].parent] == 0) refuse("a late branch's parent drafts nothing");
    if (window.late[i].token < 0) {
      check_range("a late branch's rank", window.late[i].rank, 0, window.alternatives.count);
    } else {
      check_range("a late branch's token", window.late[i].token, 0, decoder_.shape().vocab_size);
      if (decoder_.reads_features()) check_range("a late branch's state", window.late[i].state, 0, window.states.count);
    }
    check_range("num_draft", window.num_draft[sequence], 1, window.longest + 1);
    check_sequence(first, window, sequence);
  }
  for (int64_t i = 0; i < 2 * window.num_late_copies; ++i) {
    check_range("a page", window.late_copies[i], 0, decoder_.shape().pages);
  }
}

void WindowDrafter::check_sequence(const DecoderBatch& first, const DraftWindow& window, int64_t sequence) const {
  const DecoderShape& shape = decoder_.shape();
  if (decoder_.reads_features()) check_states(window, sequence);
  // The window's last token is drawn, not computed.
  const int64_t computed = first.context_lens[sequence] + window.num_draft[sequence] - 1;
  check_range("the end of a window", computed, 0, shape.max_position + 1);
  const int64_t pages = (computed + shape.page_size - 1) / shape.page_size;
  check_range("a sequence's number of pages", pages, 0, first.table_width + 1);
  const int32_t* table = first.block_tables + sequence * first.table_width;
  for (int64_t i = 0; i < pages; ++i) check_range("a page", table[i], 0, shape.pages);
  if (window.ring_base[sequence] >= 0) {
    check_range("ring_size", window.ring_size[sequence], 1, window.ring_rows + 1);
    check_range("ring_base", window.ring_base[sequence], 0, window.ring_rows - window.ring_size[sequence] + 1);
  }
}

void WindowDrafter::check_states(const DraftWindow& window, int64_t sequence) const {
  const StatesView& states = window.states;
  check_range("states' size", states.size[sequence], 1, states.count + 1);
  check_range("states' base", states.base[sequence], 0, states.count - states.size[sequence] + 1);
}

/// The block tables of the sequences that go on, where these are not the batch's first ones.
void WindowDrafter::gather_tables(const DecoderBatch& first) {
  tables_.clear();
  if (are_first(drafting_)) return;
  for (const int64_t sequence : drafting_) {
    const int32_t* table = first.block_tables + sequence * first.table_width;
    tables_.insert(tables_.end(), table, table + first.table_width);
  }
}

/// The token of this step for each sequence, from the rows of first.logits.
void WindowDrafter::draw(const DecoderBatch& first, const DraftWindow& window, int64_t step) {
  const DecoderShape& shape = decoder_.shape();
  const auto rows = static_cast<int64_t>(drafting_.size());
  gather(window.sampling.temperature, drafting_, temperature_);
  gather(window.sampling.top_k, drafting_, top_k_);
  gather(window.sampling.top_p, drafting_, top_p_);
  gather(window.sampling.min_p, drafting_, min_p_);
  gather(window.sampling.seed, drafting_, seed_);
  positions_.clear();
  for (const int64_t sequence : drafting_) positions_.push_back(token_position(first, sequence, step));
  drawn_.resize(drafting_.size());
  logprobs_.resize(drafting_.size());
  const AlternativesView alternatives = alternatives_of(rows, window.alternatives.count);
  kernels().sample({{first.logits, shape.dtype, rows, shape.vocab_size},
                    {temperature_.data(), top_k_.data(), top_p_.data(), min_p_.data(), seed_.data()},
                    positions_.data(),
                    window.vocab_size,
                    window.stream,
                    drawn_.data(),
                    logprobs_.data(),
                    alternatives});
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t place = drafting_[row] * window.longest + step;
    window.tokens[place] = drawn_[row];
    window.logprobs[place] = logprobs_[row];
    keep_alternatives(window.alternatives, row, place);
    keep_logits(first, window, row, positions_[row]);
  }
}

/// Room for those of one step.
AlternativesView WindowDrafter::alternatives_of(int64_t rows, int64_t count) {
  if (count == 0) return {};
  alternative_tokens_.resize(static_cast<size_t>(rows * count));
  alternative_scores_.resize(static_cast<size_t>(rows * count));
  drawn_scores_.resize(static_cast<size_t>(rows));
  return {count, alternative_tokens_.data(), alternative_scores_.data(), drawn_scores_.data()};
}

/// Those of row `row` of this step, to their place in the window.
void WindowDrafter::keep_alternatives(const AlternativesView& all, int64_t row, int64_t place) const {
  if (all.count == 0) return;
  std::copy_n(alternative_tokens_.data() + row * all.count, all.count, all.tokens + place * all.count);
  std::copy_n(alternative_scores_.data() + row * all.count, all.count, all.scores + place * all.count);
  all.drawn[place] = drawn_scores_[static_cast<size_t>(row)];
}

void WindowDrafter::keep_logits(const DecoderBatch& first, const DraftWindow& window, int64_t row,
                                int64_t position) const {
  const int64_t base = window.ring_base[drafting_[row]];
  if (base < 0) return;
  const int64_t size = window.ring_size[drafting_[row]];
  const int64_t bytes = decoder_.shape().vocab_size * bytes_of(decoder_.shape().dtype);
  std::memcpy(static_cast<uint8_t*>(window.ring) + (base + position % size) * bytes,
              static_cast<const uint8_t*>(first.logits) + row * bytes, bytes);
}

/// The forward of the tokens of the step before.
DecoderBatch WindowDrafter::next(const DecoderBatch& first, const DraftWindow& window, int64_t step) {
  const int64_t page_size = decoder_.shape().page_size;
  input_ids_.clear();
  positions_.clear();
  slots_.clear();
  rows_.clear();
  contexts_.clear();
  features_.clear();
  starts_.assign(1, 0);
  const int64_t bytes = decoder_.shape().hidden * bytes_of(decoder_.shape().dtype);
  for (const int64_t sequence : drafting_) {
    const int32_t* table = first.block_tables + sequence * first.table_width;
    const int64_t position = first.context_lens[sequence] + step - 1;
    input_ids_.push_back(window.tokens[sequence * window.longest + step - 1]);
    positions_.push_back(position);
    slots_.push_back(table[position / page_size] * page_size + position % page_size);
    rows_.push_back(static_cast<int64_t>(rows_.size()));
    contexts_.push_back(static_cast<int32_t>(position + 1));
    starts_.push_back(static_cast<int32_t>(rows_.size()));
    if (!decoder_.reads_features()) continue;
    const uint8_t* state = state_of(window, sequence, token_position(first, sequence, step - 1));
    features_.insert(features_.end(), state, state + bytes);
  }
  const auto rows = static_cast<int64_t>(drafting_.size());
  return {rows,
          rows,
          first.table_width,
          rows,
          input_ids_.data(),
          positions_.data(),
          slots_.data(),
          are_first(drafting_) ? first.block_tables : tables_.data(),
          starts_.data(),
          contexts_.data(),
          rows_.data(),
          first.logits,
          {},
          decoder_.reads_features() ? features_.data() : nullptr};
}

}  // namespace pearl
