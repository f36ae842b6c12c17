#pragma once

#include <pybind11/pybind11.h>

/// Classes Matrix, MatrixStack, ExpertLayer and ExpertThreads, and route.
void bind_experts(pybind11::module_& m);
