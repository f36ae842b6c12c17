#pragma once

#include <cstdint>

#include "pearl/params.h"

namespace pearl {

/// As pearl_kernels.reference.experts.route; 1 <= top_k <= experts.
void route(const RouteParams& p);

}  // namespace pearl
