// A row of logits in device memory. Threads read it in vectors of eight.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "pearl/params.h"

namespace pearl::cuda {

inline constexpr int kVector = 8;

__device__ __forceinline__ void prefetch_to_l2(const void* address) {
#ifdef PEARL_EMU
  static_cast<void>(address);
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

struct LogitsRow {
  const void* data;
  DType dtype;
  bool aligned;  // data is a multiple of 16 bytes
  int32_t size;  // what follows in memory is never read
};

__host__ __device__ __forceinline__ int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

/// Whether every row of the view is a multiple of 16 bytes away from address 0.
inline bool rows_are_aligned(const LogitsView& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride * bytes_of(view.dtype) % 16 == 0;
}

__device__ __forceinline__ LogitsRow row_of(const LogitsView& view, bool aligned, int64_t row, int32_t vocab_size) {
  return {static_cast<const char*>(view.data) + row * view.stride * bytes_of(view.dtype), view.dtype, aligned,
          vocab_size};
}

/// Asks for `count` logits from `first` on, at most one line for each of `threads` threads, without waiting for them.
__device__ __forceinline__ void prefetch(const LogitsRow& row, int first, int count, int threads) {
  constexpr int kLineBytes = 128;
  const int64_t element = bytes_of(row.dtype), end = min(first + count, row.size) * element;
  for (int64_t at = first * element + threadIdx.x * kLineBytes; at < end; at += threads * kLineBytes) {
    prefetch_to_l2(static_cast<const char*>(row.data) + at);
  }
}

template <DType kType>
__device__ __forceinline__ float logit_as(const void* data, int64_t token) {
  if (kType == DType::kFloat32) return __ldg(static_cast<const float*>(data) + token);
  const uint32_t bits = __ldg(static_cast<const uint16_t*>(data) + token);
  if (kType == DType::kBFloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}

/// Two 16-bit logits.
template <DType kType>
__device__ __forceinline__ void unpack_pair(uint32_t word, float& low, float& high) {
  if (kType == DType::kBFloat16) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xFFFF0000u);
  } else {
    low = __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
    high = __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16)));
  }
}

template <DType kType, int kParts>
__device__ __forceinline__ void unpack(const uint4 (&raw)[kParts], float (&x)[kVector]) {
  const uint32_t words[kVector] = {raw[0].x,          raw[0].y,          raw[0].z,          raw[0].w,
                                   raw[kParts - 1].x, raw[kParts - 1].y, raw[kParts - 1].z, raw[kParts - 1].w};
#pragma unroll
  for (int e = 0; e < kVector; e += 2) {
    if (kType == DType::kFloat32) {
      x[e] = __uint_as_float(words[e]);
      x[e + 1] = __uint_as_float(words[e + 1]);
    } else {
      unpack_pair<kType>(words[e / 2], x[e], x[e + 1]);
    }
  }
}

template <DType kType>
__device__ __forceinline__ const uint4* vector_at(const LogitsRow& row, int at) {
  constexpr int kBytes = kType == DType::kFloat32 ? 4 : 2;
  return reinterpret_cast<const uint4*>(static_cast<const char*>(row.data) + int64_t{at} * kBytes);
}

template <DType kType, int kCount>
__device__ __forceinline__ void load_as(const LogitsRow& row, int first, int stride, float (&x)[kCount][kVector]) {
  constexpr int kParts = kType == DType::kFloat32 ? 2 : 1;
  const int whole = row.aligned ? row.size - kVector : -1;  // vectors up to here can be loaded in parts of 16 bytes
  if (first + (kCount - 1) * stride <= whole) {
    uint4 raw[kCount][kParts];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {  // all loads are on their way before the first is used
#pragma unroll
      for (int part = 0; part < kParts; ++part) raw[i][part] = __ldg(vector_at<kType>(row, first + i * stride) + part);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) unpack<kType>(raw[i], x[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int at = first + i * stride;
    if (at <= whole) {
      uint4 raw[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) raw[part] = __ldg(vector_at<kType>(row, at) + part);
      unpack<kType>(raw, x[i]);
      continue;
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      x[i][e] = at + e < row.size ? logit_as<kType>(row.data, at + e) : __uint_as_float(0x7FFFFFFFu);
    }
  }
}

/// kCount vectors, the i-th from logit first + i * stride on, a multiple of eight. Past the row's end is NaN, which is
/// no token: it is never the largest, and above no cutoff.
template <int kCount>
__device__ __forceinline__ void load(const LogitsRow& row, int first, int stride, float (&x)[kCount][kVector]) {
  switch (row.dtype) {
    case DType::kFloat32:
      return load_as<DType::kFloat32>(row, first, stride, x);
    case DType::kBFloat16:
      return load_as<DType::kBFloat16>(row, first, stride, x);
    case DType::kFloat16:
      return load_as<DType::kFloat16>(row, first, stride, x);
  }
}

__device__ __forceinline__ float logit(const LogitsRow& row, int64_t token) {
  switch (row.dtype) {
    case DType::kFloat32:
      return logit_as<DType::kFloat32>(row.data, token);
    case DType::kBFloat16:
      return logit_as<DType::kBFloat16>(row.data, token);
    default:
      return logit_as<DType::kFloat16>(row.data, token);
  }
}

}  // namespace pearl::cuda
