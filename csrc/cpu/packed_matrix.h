// Linear layers as a forward holds them: one matrix, or one for each of a layer's experts.
#pragma once

#include <cstdint>

#include "pearl/params.h"

namespace pearl {

/// A linear layer: see LinearParams.
struct PackedMatrix {
  WeightFormat format;
  int64_t in_features, out_features;
  const void* weight;
  const float* scale;
  const float* offset;
  int64_t group;
  const void* bias;
};

/// out = x @ matrix for `rows` contiguous rows; scratch is set by who computes it.
inline LinearParams product(const PackedMatrix& matrix, DType dtype, int64_t rows, const void* x, void* out) {
  return {dtype,         matrix.format, rows,          matrix.in_features, matrix.out_features, x,   matrix.in_features,
          matrix.weight, matrix.scale,  matrix.offset, matrix.group,       matrix.bias,         out, nullptr};
}

/// `count` matrices of one shape and format; the strides are bytes from one's tensors to the next one's.
struct MatrixStack {
  PackedMatrix first;
  int64_t count, weight_stride, scale_stride, offset_stride, bias_stride;

  PackedMatrix at(int64_t index) const {
    PackedMatrix matrix = first;
    matrix.weight = static_cast<const char*>(first.weight) + index * weight_stride;
    if (first.scale != nullptr) matrix.scale = first.scale + index * scale_stride / 4;
    if (first.offset != nullptr) matrix.offset = first.offset + index * offset_stride / 4;
    if (first.bias != nullptr) matrix.bias = static_cast<const char*>(first.bias) + index * bias_stride;
    return matrix;
  }
};

}  // namespace pearl
