#define PEARL_ISA amx
#define PEARL_TILES
#include "cpu/simd_avx512.h"

#include "cpu/kernels.inl"
