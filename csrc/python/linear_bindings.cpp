#include "python/linear_bindings.h"

#include <cstdint>

#include "cpu/parallel.h"
#include "python/arguments.h"

namespace py = pybind11;

namespace {

/// The memory that linear needs beside its result is kept from call to call, as the threads are.
struct LinearThreads {
  explicit LinearThreads(int64_t threads) : pool(threads), scratch(pool) {}

  pearl::ThreadPool pool;
  pearl::parallel::LinearScratch scratch;
};

/// scale, offset: 0 where the format has none.
void linear(LinearThreads& threads, int dtype, int format, int64_t rows, int64_t in_features, int64_t out_features,
            Address x, int64_t x_stride, Address weight, Address scale, Address offset, int64_t group, Address bias,
            Address out) {
  pearl::parallel::linear(
      threads.pool,
      {static_cast<pearl::DType>(dtype), static_cast<pearl::WeightFormat>(format), rows, in_features, out_features,
       pointer<const void>(x), x_stride, pointer<const void>(weight), pointer<const float>(scale),
       pointer<const float>(offset), group, pointer<const void>(bias), pointer<void>(out), nullptr},
      threads.scratch);
}

}  // namespace

void bind_linear(py::module_& m) {
  m.attr("PANEL_COLUMNS") = pearl::kPanelColumns;
  py::class_<LinearThreads>(m, "LinearThreads")
      .def(py::init<int64_t>())
      .def("linear", &linear, py::call_guard<py::gil_scoped_release>());
}
