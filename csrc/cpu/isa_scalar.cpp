#define PEARL_ISA scalar
#include "cpu/simd_scalar.h"

#include "cpu/kernels.inl"
