#pragma once

#include "pearl/params.h"

namespace pearl {

/// Copies whole pages. No destination is also a source or destination of another pair.
void copy_blocks(const CopyBlocksParams& p);

}  // namespace pearl
