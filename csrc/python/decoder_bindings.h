// The whole decoder as a Python class.
#pragma once

#include <pybind11/pybind11.h>

void bind_decoder(pybind11::module_& m);
