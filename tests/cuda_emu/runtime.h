// The part of the CUDA runtime that kernels' host code calls, for devices that compute at once.
#pragma once

#include "devices.h"
#include "launch.h"

extern "C" {
inline cudaError_t cudaGetLastError() {
  const cudaError_t error = emu::last_error;
  emu::last_error = cudaSuccess;
  return error;
}
inline cudaError_t cudaPeekAtLastError() { return emu::last_error; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess                      ? "no error"
         : error == cudaErrorInvalidValue          ? "invalid argument"
         : error == cudaErrorInvalidConfiguration  ? "invalid configuration argument"
         : error == cudaErrorInvalidDevice         ? "invalid device ordinal"
         : error == cudaErrorInvalidDeviceFunction ? "invalid device function"
         : error == cudaErrorNotSupported          ? "operation not supported"
                                                   : "unknown error";
}
inline const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = emu::kDevices;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = emu::current_device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emu::kDevices) return emu::failed(cudaErrorInvalidDevice);
  emu::current_device = device;
  emu::devices.used[device] = true;  // since CUDA 12
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(name, "cuDevicePrimaryCtxGetState") == 0;
  *function = known ? reinterpret_cast<void*>(emu::context_state) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
/// An H100 but for shared memory, which is the device's, and the number of multiprocessors, which is small so that
/// loops over tiles have more than one turn.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  ++emu::devices.attribute_queries;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(emu::kSharedBytes[device]);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(emu::kSharedBytes[device]) + 1024;
      return cudaSuccess;
    default:
      return emu::failed(cudaErrorInvalidValue);
  }
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  ++emu::devices.function_attributes;
  emu::devices.used[emu::current_device] = true;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  const size_t most = emu::kSharedBytes[emu::current_device];
  if (value < 0 || static_cast<size_t>(value) > most) return emu::failed(cudaErrorInvalidValue);
  emu::allowed_shared_bytes[{kernel, emu::current_device}] = static_cast<size_t>(value);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// For tests, through ctypes. Without `used` and a visible name they would not be in the library.
#define PEARL_ASKED __attribute__((used, visibility("default"))) inline
PEARL_ASKED int emu_device_is_used(int device) { return emu::devices.used[device]; }
PEARL_ASKED int emu_current_device() { return emu::current_device; }
PEARL_ASKED int emu_last_error() { return cudaPeekAtLastError(); }
PEARL_ASKED void emu_leave_error(int error) { emu::last_error = static_cast<cudaError_t>(error); }
PEARL_ASKED int emu_attribute_queries() { return emu::devices.attribute_queries; }
PEARL_ASKED int emu_function_attributes() { return emu::devices.function_attributes; }
#undef PEARL_ASKED
}
