// linear and the threads it runs on.
#pragma once

#include <pybind11/pybind11.h>

void bind_linear(pybind11::module_& m);
