// A forward's batch from the engine's work items.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "cpu/decoder.h"

/// Owns the index arrays that its base points to. Copies would point into each other.
struct WorkBatch : pearl::DecoderBatch {
  /// `work`: a tuple (tokens, start, num_logits, block_table) for each sequence, as in pearl/messages.py's ForwardWork.
  /// Throws std::invalid_argument if a block table is too short for the tokens.
  WorkBatch(const pybind11::list& work, int64_t page_size);
  WorkBatch(const WorkBatch&) = delete;
  WorkBatch& operator=(const WorkBatch&) = delete;

 private:
  void add(const pybind11::tuple& tokens, int64_t start, int64_t wanted, const pybind11::tuple& table,
           int64_t page_size);

  std::vector<int64_t> ids_, places_, slots_, rows_;
  std::vector<int32_t> tables_, starts_, contexts_;
};
