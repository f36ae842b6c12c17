// scale_and_cap.

namespace pearl::PEARL_ISA {

template <class T>
void scale_and_cap_rows(const ScaleAndCapParams& p) {
  const Vec scale = broadcast(p.scale), cap = broadcast(p.softcap), none = broadcast(kMinusInfinity);
  for (int64_t row = 0; row < p.rows; ++row) {
    T* x = static_cast<T*>(p.x) + row * p.x_stride;
    for_each_vector(p.width, [&](int64_t i, int64_t count) {
      Vec value = load_some(x + i, count) * scale;
      if (p.softcap > 0) value = select(value == none, none, cap * tanh(value / cap));
      store_some(x + i, value, count);
    });
  }
}

void scale_and_cap(const ScaleAndCapParams& p) {
  p.dtype == DType::kFloat32 ? scale_and_cap_rows<float>(p) : scale_and_cap_rows<BFloat16>(p);
}

}  // namespace pearl::PEARL_ISA
