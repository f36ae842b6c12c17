// Validation of what tensors contain, before a kernel follows it into memory. What tensors *are* (dtype, shape, stride)
// is checked in Python. Each function throws std::invalid_argument, ValueError in Python.
#pragma once

#include "pearl/params.h"

namespace pearl {

void check(const RopeAndCacheParams& p);
void check(const AttentionParams& p);
void check(const VerifyParams& p);
void check(const CopyBlocksParams& p);

}  // namespace pearl
