// rms_norm and add_rms_norm, and the sum without a norm.

namespace pearl::PEARL_ISA {

/// x becomes x + residual, rounded to T, in place of residual; returns the factor that norms the sum.
template <class T>
inline float add_and_scale(const T* x, T* residual, int64_t width, float eps) {
  Vec squares = broadcast(0.0f);
  for_each_vector(width, [&](int64_t i, int64_t count) {
    store_some(residual + i, load_some(residual + i, count) + load_some(x + i, count), count);
    const Vec sum = load_some(residual + i, count);
    squares = mul_add(sum, sum, squares);
  });
  return 1.0f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(width) + eps);
}

template <class T>
inline float rms_scale(const T* x, int64_t width, float eps) {
  Vec squares = broadcast(0.0f);
  for_each_vector(width, [&](int64_t i, int64_t count) {
    const Vec value = load_some(x + i, count);
    squares = mul_add(value, value, squares);
  });
  return 1.0f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(width) + eps);
}

template <class T>
inline void scale_row(const T* x, const T* weight, float scale, int64_t width, T* out) {
  for_each_vector(width, [&](int64_t i, int64_t count) {
    store_some(out + i, load_some(x + i, count) * broadcast(scale) * load_some(weight + i, count), count);
  });
}

template <class T>
inline void add_row(const T* x, T* residual, int64_t width) {
  for_each_vector(width, [&](int64_t i, int64_t count) {
    store_some(residual + i, load_some(residual + i, count) + load_some(x + i, count), count);
  });
}

template <class T>
void rms_norm_rows(const RmsNormParams& p) {
  const auto* weight = static_cast<const T*>(p.weight);
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    T* out = static_cast<T*>(p.out) + row * p.width;
    if (p.weight == nullptr) {
      add_row(x, static_cast<T*>(p.residual) + row * p.residual_stride, p.width);
    } else if (p.residual == nullptr) {
      scale_row(x, weight, rms_scale(x, p.width, p.eps), p.width, out);
    } else {
      T* residual = static_cast<T*>(p.residual) + row * p.residual_stride;
      scale_row(residual, weight, add_and_scale(x, residual, p.width, p.eps), p.width, out);
    }
  }
}

void rms_norm(const RmsNormParams& p) {
  p.dtype == DType::kFloat32 ? rms_norm_rows<float>(p) : rms_norm_rows<BFloat16>(p);
}

}  // namespace pearl::PEARL_ISA
