// The instructions that C++ has no name for: asynchronous copies to shared memory, barriers of some warps, matrix loads
// and tensor core products (PTX ISA, "cp.async", "bar.sync", "ldmatrix", "mma.m16n8k16"), and the fast exponential. All
// need sm_80. Under the test shim each has an emulation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace pearl::cuda {

#ifndef PEARL_EMU
/// The address that PTX uses for shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

/// Begins copying 16 bytes from global to shared memory; both addresses are multiples of 16. The L1 cache is passed by.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
#ifdef PEARL_EMU
  emu::async_copy(shared, global, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
#endif
}

/// As above if `live`, else 16 zeros, and global, which must still be a valid address, is not read.
__device__ __forceinline__ void cp_async_16_or_zero(void* shared, const void* global, bool live) {
#ifdef PEARL_EMU
  emu::async_copy(shared, live ? global : nullptr, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(live ? 16 : 0)
               : "memory");
#endif
}

/// The copies that this thread has begun since the last commit become its youngest group.
__device__ __forceinline__ void cp_async_commit() {
#ifdef PEARL_EMU
  emu::async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/// Waits until at most the `kPending` youngest of this thread's groups are on their way. What other threads copied is
/// visible after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef PEARL_EMU
  emu::async_wait(kPending);  // what the copies wrote comes before what this thread reads
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

/// Barrier `id`, 1 to 15, of the `threads` threads, whole warps, that come to it; __syncthreads is another barrier.
#ifdef PEARL_EMU
using emu::named_barrier;
#else
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

/// Two / four 8 x 8 matrices of 16-bit elements from shared memory. Lane 8 i + j gives the address of row j of matrix i
/// (x2: lanes 0 to 15), a multiple of 16. Lane l gets, of each matrix, elements 2 (l % 4) and 2 (l % 4) + 1 of row l /
/// 4; of column l / 4 with _trans.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
#ifdef PEARL_EMU
  const auto loaded = emu::load_matrices<2>(row, false);
  for (int i = 0; i < 2; ++i) r[i] = loaded[i];
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
#ifdef PEARL_EMU
  const auto loaded = emu::load_matrices<2>(row, true);
  for (int i = 0; i < 2; ++i) r[i] = loaded[i];
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef PEARL_EMU
  const auto loaded = emu::load_matrices<4>(row, false);
  for (int i = 0; i < 4; ++i) r[i] = loaded[i];
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef PEARL_EMU
  const auto loaded = emu::load_matrices<4>(row, true);
  for (int i = 0; i < 4; ++i) r[i] = loaded[i];
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

/// c += A B on the tensor cores, A 16 x 16 and B 16 x 8 of T (__nv_bfloat16 or __half), sums in fp32. With g = lane / 4
/// and t = lane % 4, each register of a and b holding two neighbours along the inner dimension:
///   a: A's (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8)      b: B's (2 t, g), (2 t + 8, g)
///   c: (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1)
/// ldmatrix_x4 loads a from rows of A, ldmatrix_x2 loads b from rows of B's transpose, ldmatrix_x2_trans from rows of
/// B.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same<T, __nv_bfloat16>::value || std::is_same<T, __half>::value, "a tensor core type");
#ifdef PEARL_EMU
  emu::mma_m16n8k16<T>(c, a, b);
#else
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

/// 2^x to two units in the last place; results below the normal range are zero, 2^-inf = 0.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef PEARL_EMU
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace pearl::cuda
