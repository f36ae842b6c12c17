// Sizes of the numbers that the CPU kernels take.
#pragma once

#include <cstdint>

#include "pearl/params.h"

namespace pearl {

inline int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace pearl
