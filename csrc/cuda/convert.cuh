// Element types: conversion to and from fp32, and runs of elements that move in one access.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "pearl/params.h"

namespace pearl::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

/// x rounded to the nearest T, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

/// Elements that lie together; one load or store moves up to 16 bytes of them.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

template <class T>
inline constexpr int kPackElements = 16 / static_cast<int>(sizeof(T));

/// kCount elements from p, in one access where `kAligned` promises that p is a multiple of their size.
template <int kCount, bool kAligned, class T>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* p) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Pack<T, kCount>*>(p);
  } else {
    Pack<T, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.values[i] = p[i];
    return pack;
  }
}

template <bool kAligned, int kCount, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kCount>& pack) {
  if constexpr (kAligned) {
    *reinterpret_cast<Pack<T, kCount>*>(p) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) p[i] = pack.values[i];
  }
}

/// Whether every address is a multiple of `bytes`.
template <class... Pointers>
bool aligned(int64_t bytes, Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % static_cast<uintptr_t>(bytes) == 0) && ...);
}

/// Calls visit(T{}) with the element type; cudaErrorInvalidValue for an unknown code.
template <class Visit>
cudaError_t for_dtype(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(float{});
    case DType::kBFloat16:
      return visit(__nv_bfloat16{});
    case DType::kFloat16:
      return visit(__half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace pearl::cuda
