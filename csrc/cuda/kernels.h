// The CUDA kernels by operator. Each function checks what it can on the host (alignment, limits), launches on `stream`
// of the current device and returns the first error; it neither allocates nor synchronises, so it can be captured in a
// graph. All pointers of the params are device memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "pearl/params.h"

namespace pearl::cuda {

cudaError_t rms_norm(const RmsNormParams& p, cudaStream_t stream);
cudaError_t gated_activation(const GatedParams& p, cudaStream_t stream);
cudaError_t scale_and_cap(const ScaleAndCapParams& p, cudaStream_t stream);
cudaError_t rope_and_cache(const RopeAndCacheParams& p, cudaStream_t stream);
cudaError_t verify_attention(const AttentionParams& p, cudaStream_t stream);
cudaError_t verify(const VerifyParams& p, cudaStream_t stream);
cudaError_t copy_blocks(const CopyBlocksParams& p, cudaStream_t stream);

/// Bytes that params.workspace must have; every other field of the params must be set.
int64_t verify_attention_workspace(const AttentionParams& p);
int64_t verify_workspace(const VerifyParams& p);

/// Bytes of shared memory that a block of verify_attention takes at least, q and caches of one type.
int64_t verify_attention_shared(DType dtype, int64_t head_dim);

}  // namespace pearl::cuda
