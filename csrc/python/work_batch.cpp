#include "python/work_batch.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace py = pybind11;

namespace {

constexpr Py_ssize_t kTokens = 1, kStart = 2, kNumLogits = 3, kBlockTable = 4, kFields = 5;  // of a ForwardWork

int64_t integer(PyObject* number) {
  const int64_t value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

int32_t page_of(PyObject* number) {
  const int64_t page = integer(number);
  if (page < std::numeric_limits<int32_t>::min() || page > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("decoder: there is no page " + std::to_string(page));
  }
  return static_cast<int32_t>(page);
}

py::tuple tuple_field(py::handle item, Py_ssize_t field) {
  PyObject* value = PyTuple_GET_ITEM(item.ptr(), field);
  if (!PyTuple_Check(value)) throw py::type_error("decoder: tokens and block tables are tuples");
  return py::reinterpret_borrow<py::tuple>(value);
}

}  // namespace

WorkBatch::WorkBatch(int64_t page_size) : DecoderBatch{}, page_size_(page_size) {}

void WorkBatch::set(const py::sequence& work) {
  ids_.clear();
  places_.clear();
  slots_.clear();
  rows_.clear();
  contexts_.clear();
  starts_.assign(1, 0);
  sequences = static_cast<int64_t>(work.size());
  int64_t longest = 0;
  for (const py::handle item : work) {
    if (!PyTuple_Check(item.ptr()) || PyTuple_GET_SIZE(item.ptr()) != kFields) {
      throw py::type_error("decoder: a batch is made of ForwardWork");
    }
    longest = std::max(longest, static_cast<int64_t>(tuple_field(item, kBlockTable).size()));
  }
  make_room(sequences, longest);
  int64_t row = 0;
  for (const py::handle item : work) add(row++, item);
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

void WorkBatch::make_room(int64_t rows, int64_t pages) {
  if (pages > table_width) {  // twice as wide, so that growing tables seldom move
    table_width = std::max(pages, 2 * table_width);
    tables_.clear();
    copied_.clear();
  }
  if (rows > static_cast<int64_t>(copied_.size())) {
    tables_.resize(static_cast<size_t>(rows * table_width), -1);
    copied_.resize(static_cast<size_t>(rows));
  }
}

void WorkBatch::add(int64_t row, py::handle item) {
  const py::tuple new_tokens = tuple_field(item, kTokens), table = tuple_field(item, kBlockTable);
  const int64_t start = integer(PyTuple_GET_ITEM(item.ptr(), kStart));
  const int64_t wanted = integer(PyTuple_GET_ITEM(item.ptr(), kNumLogits));
  const auto count = static_cast<int64_t>(new_tokens.size()), pages = static_cast<int64_t>(table.size());
  if (start < 0 || start + count > pages * page_size_ || wanted < 0 || wanted > count) {
    throw std::invalid_argument("decoder: " + std::to_string(count) + " tokens from position " + std::to_string(start) +
                                ", " + std::to_string(wanted) + " of them with logits, on " + std::to_string(pages) +
                                " pages of " + std::to_string(page_size_));
  }
  copy_table(row, table);
  const int32_t* page = table_row(row);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = start + i;
    ids_.push_back(integer(PyTuple_GET_ITEM(new_tokens.ptr(), i)));
    places_.push_back(position);
    slots_.push_back(page[position / page_size_] * page_size_ + position % page_size_);
  }
  const auto end = static_cast<int64_t>(ids_.size());
  for (int64_t i = end - wanted; i < end; ++i) rows_.push_back(i);
  contexts_.push_back(static_cast<int32_t>(start + count));
  starts_.push_back(static_cast<int32_t>(end));
}

void WorkBatch::copy_table(int64_t row, py::tuple table) {
  py::object& copied = copied_[static_cast<size_t>(row)];
  if (copied.is(table)) return;
  int32_t* pages = table_row(row);
  const py::object before = std::exchange(copied, py::object());  // until all is written, the row holds any pages
  if (!before) std::fill_n(pages, table_width, -1);
  const Py_ssize_t held = before ? PyTuple_GET_SIZE(before.ptr()) : 0, size = PyTuple_GET_SIZE(table.ptr());
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* page = PyTuple_GET_ITEM(table.ptr(), i);
    // A page that stays is the same object. One that is equal, but another object, is written once more.
    if (i < held && page == PyTuple_GET_ITEM(before.ptr(), i)) continue;
    pages[i] = page_of(page);
  }
  if (size < held) std::fill(pages + size, pages + held, -1);
  copied = std::move(table);
}
