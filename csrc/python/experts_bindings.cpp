#include "python/experts_bindings.h"

#include <cstdint>

#include "cpu/experts.h"
#include "cpu/routing.h"
#include "python/arguments.h"
#include "python/matrix_arguments.h"

namespace py = pybind11;

namespace {

/// What experts need beside their result is kept from call to call, as the threads are.
struct ExpertThreads {
  explicit ExpertThreads(int64_t threads) : pool(threads), experts(pool) {}

  pearl::ThreadPool pool;
  pearl::Experts experts;
};

void run(ExpertThreads& threads, const ExpertLayerArgument& layer, int dtype, int64_t rows, int64_t top_k, Address x,
         Address chosen, Address weights, Address shared, Address shared_gate, Address out) {
  threads.experts.run(threads.pool, layer,
                      {static_cast<pearl::DType>(dtype), rows, top_k, pointer<const void>(x),
                       pointer<const int32_t>(chosen), pointer<const float>(weights), pointer<const void>(shared),
                       pointer<const void>(shared_gate), pointer<void>(out)});
}

void route(int dtype, int64_t rows, int64_t experts, int64_t top_k, Address logits, int64_t logits_stride,
           bool renormalise, Address chosen, Address weights) {
  pearl::route({static_cast<pearl::DType>(dtype), rows, experts, top_k, pointer<const void>(logits), logits_stride,
                renormalise, pointer<int32_t>(chosen), pointer<float>(weights)});
}

}  // namespace

void bind_experts(py::module_& m) {
  py::class_<MatrixArgument>(m, "Matrix")
      .def(py::init<int, int64_t, int64_t, Address, Address, Address, int64_t, Address>());
  py::class_<MatrixStackArgument>(m, "MatrixStack")
      .def(py::init<int64_t, const MatrixArgument&, int64_t, int64_t, int64_t, int64_t>());
  py::class_<ExpertLayerArgument>(m, "ExpertLayer")
      .def(py::init<const MatrixStackArgument&, const MatrixStackArgument&, float, float, float>());
  py::class_<ExpertThreads>(m, "ExpertThreads")
      .def(py::init<int64_t>())
      .def("run", &run, py::call_guard<py::gil_scoped_release>());
  m.def("route", &route, py::call_guard<py::gil_scoped_release>());
}
