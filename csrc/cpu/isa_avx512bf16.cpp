#define PEARL_ISA avx512bf16
#include "cpu/simd_avx512.h"

#include "cpu/kernels.inl"
