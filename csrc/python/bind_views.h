// The arguments that are not numbers, as Python classes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "python/make_params.h"

/// Classes Logits and Sampling; both native modules have their own.
inline void bind_views(pybind11::module_& m) {
  namespace py = pybind11;
  using pearl::LogitsArgument;
  using pearl::SamplingArgument;
  py::class_<LogitsArgument>(m, "Logits", py::module_local()).def(py::init<Address, int, int64_t, int64_t>());
  py::class_<SamplingArgument>(m, "Sampling", py::module_local())
      .def(py::init<Address, Address, Address, Address, Address>());
}
