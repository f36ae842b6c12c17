#include "python/work_batch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace py = pybind11;

WorkBatch::WorkBatch(const py::list& work, int64_t page_size) : DecoderBatch{}, starts_(1, 0) {
  sequences = static_cast<int64_t>(work.size());
  for (const py::handle item : work) {
    const auto table = item.cast<py::tuple>()[3].cast<py::tuple>();
    table_width = std::max(table_width, static_cast<int64_t>(table.size()));
  }
  for (const py::handle item : work) {
    const auto fields = item.cast<py::tuple>();
    add(fields[0].cast<py::tuple>(), fields[1].cast<int64_t>(), fields[2].cast<int64_t>(), fields[3].cast<py::tuple>(),
        page_size);
  }
  tokens = static_cast<int64_t>(ids_.size());
  num_logits = static_cast<int64_t>(rows_.size());
  input_ids = ids_.data();
  positions = places_.data();
  slot_mapping = slots_.data();
  block_tables = tables_.data();
  query_start = starts_.data();
  context_lens = contexts_.data();
  logits_rows = rows_.data();
}

void WorkBatch::add(const py::tuple& new_tokens, int64_t start, int64_t wanted, const py::tuple& table,
                    int64_t page_size) {
  const auto count = static_cast<int64_t>(new_tokens.size()), pages = static_cast<int64_t>(table.size());
  if (start < 0 || start + count > pages * page_size || wanted < 0 || wanted > count) {
    throw std::invalid_argument("decoder: " + std::to_string(count) + " tokens from position " + std::to_string(start) +
                                ", " + std::to_string(wanted) + " of them with logits, on " + std::to_string(pages) +
                                " pages of " + std::to_string(page_size));
  }
  const size_t first_page = tables_.size();
  for (const py::handle page : table) tables_.push_back(page.cast<int32_t>());
  tables_.resize(first_page + static_cast<size_t>(table_width), -1);  // which no kernel reads
  for (const py::handle token : new_tokens) ids_.push_back(token.cast<int64_t>());
  for (int64_t position = start; position < start + count; ++position) {
    const int64_t page = tables_[first_page + static_cast<size_t>(position / page_size)];
    places_.push_back(position);
    slots_.push_back(page * page_size + position % page_size);
  }
  const auto rows = static_cast<int64_t>(ids_.size());
  for (int64_t row = rows - wanted; row < rows; ++row) rows_.push_back(row);
  contexts_.push_back(static_cast<int32_t>(start + count));
  starts_.push_back(static_cast<int32_t>(rows));
}
