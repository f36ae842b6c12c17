// How kernels are launched and share memory, and what the host tells the runtime about them. The test shim
// (tests/cuda_emu) replaces this header's two macros and runs the same source on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <map>
#include <mutex>
#include <utility>

#ifndef PEARL_EMU
/// Launches `kernel`, which may not have commas in its name: bind templates to a variable first. The value is the
/// cudaError_t of this launch.
#define PEARL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  pearl::cuda::launch_kernel(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)
/// Declares `T* name`, the kernel's dynamic shared memory, aligned to 16 bytes.
#define PEARL_DYN_SMEM(T, name)                                  \
  extern __shared__ __align__(16) unsigned char pearl_shared_[]; \
  T* name = reinterpret_cast<T*>(pearl_shared_)

namespace pearl::cuda {

/// kernel<<<...>>> would tell of its error through cudaGetLastError, where one that somebody else left may wait.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace pearl::cuda
#endif

namespace pearl::cuda {

/// A failed call's error, no longer left for whoever asks cudaGetLastError next.
inline cudaError_t taken(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

/// Numbers that are the same for the life of the process, by what they are of and the current device.
template <class Of>
class PerDevice {
 public:
  /// Calls make(device, number) unless the number is known and at least `least`.
  template <class Make>
  static cudaError_t get(Of of, int least, int& number, const Make& make) {
    int device = 0;
    if (const cudaError_t error = taken(cudaGetDevice(&device)); error != cudaSuccess) return error;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto known = numbers_.find({of, device});
    if (known != numbers_.end() && known->second >= least) {
      number = known->second;
      return cudaSuccess;
    }
    const cudaError_t error = taken(make(device, number));
    if (error == cudaSuccess) numbers_[{of, device}] = number;
    return error;
  }

 private:
  static inline std::mutex mutex_;
  static inline std::map<std::pair<Of, int>, int> numbers_;
};

/// An attribute of the current device.
inline cudaError_t device_attribute(cudaDeviceAttr attribute, int& value) {
  return PerDevice<cudaDeviceAttr>::get(attribute, INT_MIN, value, [=](int device, int& asked) {
    return cudaDeviceGetAttribute(&asked, attribute, device);
  });
}

/// Lets a kernel have so many bytes of dynamic shared memory on the current device, and as much of a multiprocessor's
/// memory as can be for shared memory.
inline cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  int allowed;
  return PerDevice<const void*>::get(kernel, bytes, allowed, [=](int, int& now) {
    now = bytes;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  });
}

}  // namespace pearl::cuda
