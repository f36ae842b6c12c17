// Into how many parts a kernel's work can be divided among threads. Not inline: see kernels.inl.
#pragma once

#include "pearl/params.h"

namespace pearl {

/// Panels of a packed weight, and groups of its inputs that have a scale of their own.
int64_t linear_panels(int64_t out_features);
int64_t linear_groups(const LinearParams& p);

/// Floats of scratch memory: rows of x as words, `linear_scratch_width` each, then [rows, groups] sums of x where there
/// are offsets.
int64_t linear_scratch_width(int64_t in_features);
int64_t linear_scratch_size(const LinearParams& p);

/// Rows of queries, heads of a GQA group counted, that verify_attention keeps beside each other: one block.
inline constexpr int64_t kAttentionRows = 64;

/// The most blocks that a sequence has. Each sequence and KV head is so many tasks, some of them empty.
int64_t attention_blocks(const AttentionParams& p);
int64_t attention_tasks(const AttentionParams& p);

}  // namespace pearl
