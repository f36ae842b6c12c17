#define PEARL_ISA avx2
#include "cpu/simd_avx2.h"

#include "cpu/kernels.inl"
