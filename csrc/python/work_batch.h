// A forward's batch from the engine's work items.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "cpu/decoder.h"

/// Owns the index arrays that its base points to, and makes them anew for each forward, but for the block tables: these
/// stay, a row for each place in the batch, and only pages that are not those of the forward before are written. So a
/// forward's cost does not grow with its context, as long as requests keep their places.
///
/// Belongs to one worker; used with the GIL. Copies would point into each other.
class WorkBatch : public pearl::DecoderBatch {
 public:
  explicit WorkBatch(int64_t page_size);
  WorkBatch(const WorkBatch&) = delete;
  WorkBatch& operator=(const WorkBatch&) = delete;

  /// `work`: pearl/messages.py's ForwardWork, one for each sequence. Throws std::invalid_argument if a block table is
  /// too short for the tokens; the batch is usable again after the next call that does not throw.
  void set(const pybind11::sequence& work);

 private:
  void make_room(int64_t rows, int64_t pages);
  void add(int64_t row, pybind11::handle item);
  void copy_table(int64_t row, pybind11::tuple table);
  int32_t* table_row(int64_t row) { return tables_.data() + row * table_width; }

  int64_t page_size_;
  std::vector<int64_t> ids_, places_, slots_, rows_;
  std::vector<int32_t> starts_, contexts_;
  std::vector<int32_t> tables_;           // [rows, table_width], -1 behind each table's end
  std::vector<pybind11::object> copied_;  // [rows]: the tuple whose pages the row holds; null: any pages
};
