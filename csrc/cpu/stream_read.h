#pragma once

#include <cstdint>

namespace pearl {

/// Moves every cache line of a buffer into a register, in ascending order in each of several parts, and nothing else:
/// what a kernel that has to read the buffer once cannot beat. Returns the lines' first words or-ed together.
uint64_t stream_read(const void* data, int64_t bytes);

}  // namespace pearl
