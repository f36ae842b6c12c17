// Linear layers as Python hands them over, which holds the tensors.
#pragma once

#include <cstdint>

#include "cpu/experts.h"
#include "cpu/packed_matrix.h"
#include "python/arguments.h"

/// Addresses are 0 for what the format, or the layer, does not have.
struct MatrixArgument : pearl::PackedMatrix {
  MatrixArgument(int format, int64_t in_features, int64_t out_features, Address weight, Address scale, Address offset,
                 int64_t group, Address bias)
      : PackedMatrix{static_cast<pearl::WeightFormat>(format),
                     in_features,
                     out_features,
                     pointer<const void>(weight),
                     pointer<const float>(scale),
                     pointer<const float>(offset),
                     group,
                     pointer<const void>(bias)} {}
};

/// (matrices, the first one, bytes from one's weight, scales, offsets and bias to the next one's).
struct MatrixStackArgument : pearl::MatrixStack {
  MatrixStackArgument(int64_t count, const MatrixArgument& first, int64_t weight_stride, int64_t scale_stride,
                      int64_t offset_stride, int64_t bias_stride)
      : MatrixStack{first, count, weight_stride, scale_stride, offset_stride, bias_stride} {}
};

struct ExpertLayerArgument : pearl::ExpertLayer {
  ExpertLayerArgument(const MatrixStackArgument& gate_up, const MatrixStackArgument& down, float gain, float limit,
                      float offset)
      : ExpertLayer{gate_up, down, {gain, limit, offset}} {}
};
