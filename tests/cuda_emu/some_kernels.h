// Lets csrc/python/cuda_bindings.cpp be linked with some of the kernels only; the others' addresses are null.
#pragma once

#include "cuda/kernels.h"

namespace pearl::cuda {

#define PEARL_WEAK __attribute__((weak, visibility("hidden")))
PEARL_WEAK cudaError_t rms_norm(const RmsNormParams&, cudaStream_t);
PEARL_WEAK cudaError_t gated_activation(const GatedParams&, cudaStream_t);
PEARL_WEAK cudaError_t scale_and_cap(const ScaleAndCapParams&, cudaStream_t);
PEARL_WEAK cudaError_t rope_and_cache(const RopeAndCacheParams&, cudaStream_t);
PEARL_WEAK cudaError_t verify_attention(const AttentionParams&, cudaStream_t);
PEARL_WEAK cudaError_t verify(const VerifyParams&, cudaStream_t);
PEARL_WEAK cudaError_t copy_blocks(const CopyBlocksParams&, cudaStream_t);
PEARL_WEAK int64_t verify_attention_workspace(const AttentionParams&);
PEARL_WEAK int64_t verify_workspace(const VerifyParams&);
PEARL_WEAK int64_t verify_attention_shared(DType, int64_t);
#undef PEARL_WEAK

}  // namespace pearl::cuda
