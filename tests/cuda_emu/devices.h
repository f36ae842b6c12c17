// The devices of the emulated runtime, and what tests ask about them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <iterator>

namespace emu {

inline constexpr int kDevices = 2;

/// Shared memory that a block may have, in bytes: of an H100, and of a card with capability 8.6, 8.9 or 12.0. A
/// multiprocessor has a KiB more.
inline constexpr size_t kSharedBytes[kDevices] = {227 * 1024, 99 * 1024};
inline const size_t kMostSharedBytes = *std::max_element(std::begin(kSharedBytes), std::end(kSharedBytes));

struct Devices {
  bool used[kDevices] = {};  // it has a primary context
  int attribute_queries = 0, function_attributes = 0;
};
inline Devices devices;
inline thread_local int current_device = 0;
inline thread_local cudaError_t last_error = cudaSuccess;

/// A failing call also leaves its error behind.
inline cudaError_t failed(cudaError_t error) {
  last_error = error;
  return error;
}

/// cuDevicePrimaryCtxGetState
inline int context_state(int device, unsigned* flags, int* active) {
  *flags = 0;
  *active = devices.used[device];
  return 0;
}

}  // namespace emu
