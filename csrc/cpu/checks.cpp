#include "cpu/checks.h"

#include <stdexcept>
#include <string>

namespace pearl {
namespace {

[[noreturn]] void refuse(const char* op, const std::string& what, int64_t value, int64_t limit) {
  throw std::invalid_argument(std::string(op) + ": " + what + " is " + std::to_string(value) + ", must be below " +
                              std::to_string(limit));
}

void check_below(const char* op, const char* what, int64_t value, int64_t limit) {
  if (value < 0 || value >= limit) refuse(op, what, value, limit);
}

/// starts[0 .. count] must not fall and must stay within [0, rows].
void check_starts(const char* op, const char* name, const int32_t* starts, int64_t count, int64_t rows) {
  if (starts[0] < 0) throw std::invalid_argument(std::string(op) + ": " + name + " starts below 0");
  for (int64_t i = 0; i < count; ++i) {
    if (starts[i] > starts[i + 1]) {
      throw std::invalid_argument(std::string(op) + ": " + name + " falls at entry " + std::to_string(i + 1));
    }
  }
  if (starts[count] > rows) refuse(op, std::string("last entry of ") + name, starts[count], rows + 1);
}

}  // namespace

void check(const RopeAndCacheParams& p) {
  for (int64_t i = 0; i < p.tokens; ++i) {
    check_below("rope_and_cache", "a position", p.positions[i], p.max_position);
    if (p.slot_mapping[i] >= p.slots) refuse("rope_and_cache", "a slot", p.slot_mapping[i], p.slots);
  }
}

void check(const AttentionParams& p) {
  const char* op = "verify_attention";
  check_starts(op, "query_start", p.query_start, p.sequences, p.tokens);
  if (p.query_start[0] != 0 || p.query_start[p.sequences] != p.tokens) {
    throw std::invalid_argument("verify_attention: query_start must cover all rows of q");
  }
  for (int64_t r = 0; r < p.sequences; ++r) {
    const int64_t length = p.context_lens[r], rows = p.query_start[r + 1] - p.query_start[r];
    if (length < rows) {
      throw std::invalid_argument("verify_attention: a context of " + std::to_string(length) + " keys cannot hold " +
                                  std::to_string(rows) + " queries");
    }
    const int64_t used = (length + p.page_size - 1) / p.page_size;
    if (used > p.table_width) refuse(op, "a sequence's number of pages", used, p.table_width + 1);
    const int32_t* table = p.block_tables + r * p.table_stride;
    for (int64_t i = 0; i < used; ++i) check_below(op, "a page", table[i], p.pages);
  }
}

void check(const VerifyParams& p) {
  check_starts("verify", "row_start", p.row_start, p.requests, p.logits.rows);
  for (int64_t r = 0; r < p.requests; ++r) {
    for (int64_t row = p.row_start[r]; row < p.row_start[r + 1]; ++row) {
      const int64_t token = p.draft_tokens[row];
      if (token >= p.vocab_size) refuse("verify", "a drafted token", token, p.vocab_size);
      if (p.rule == Rule::kCoupled || token < 0 || p.sampling.temperature[r] <= 0) continue;
      if (p.draft_logprobs == nullptr || p.draft_rows == nullptr) {
        throw std::invalid_argument("verify: the rules but coupled need draft_logprobs and draft_rows");
      }
      const bool has_logits = p.draft_logits.data != nullptr && p.draft_temperature != nullptr;
      const int64_t limit = has_logits ? p.draft_logits.rows : 0;
      if (p.draft_rows[row] >= limit && p.draft_rows[row] >= 0)
        refuse("verify", "a draft row", p.draft_rows[row], limit);
    }
  }
}

void check(const CopyBlocksParams& p) {
  for (int64_t i = 0; i < 2 * p.count; ++i) check_below("copy_blocks", "a page", p.pairs[i], p.pages);
}

}  // namespace pearl
