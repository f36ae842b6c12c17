#pragma once

#include <cstdint>

namespace pearl {

/// Moves every cache line of a buffer into a register and does nothing else: what a kernel that has to read the buffer
/// once can hardly beat. Returns the lines' first words or-ed together.
///
/// `streams`: 1, from the begin to the end, asking for lines 20 KB ahead; or 8, in as many parts beside each other,
/// left to the hardware's prefetchers. Which one is faster depends on the machine, by a factor of two either way.
uint64_t stream_read(const void* data, int64_t bytes, int64_t streams);

}  // namespace pearl
