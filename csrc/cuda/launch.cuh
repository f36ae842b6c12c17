// How kernels are launched and share memory. The test shim (tests/cuda_emu) replaces this header's two macros and runs
// the same source on the CPU.
#pragma once

#include <cuda_runtime.h>

#ifndef PEARL_EMU
/// Launch `kernel`, which may not have commas in its name: bind templates to a variable first.
#define PEARL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
/// Declares `T* name`, the kernel's dynamic shared memory, aligned to 16 bytes.
#define PEARL_DYN_SMEM(T, name)                                  \
  extern __shared__ __align__(16) unsigned char pearl_shared_[]; \
  T* name = reinterpret_cast<T*>(pearl_shared_)
#endif
