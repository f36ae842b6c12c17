// silu_and_mul.

namespace pearl::PEARL_ISA {

template <class T>
void silu_and_mul_rows(const SiluAndMulParams& p) {
  const Vec one = broadcast(1.0f), zero = broadcast(0.0f);
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* gates = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* ups = gates + p.width;
    T* out = static_cast<T*>(p.out) + row * p.width;
    for_each_vector(p.width, [&](int64_t i, int64_t count) {
      // Below -88.37 exp no longer grows; a bounded numerator keeps the result at zero there.
      const Vec gate = max(broadcast(-88.37f), load_some(gates + i, count));
      store_some(out + i, gate / (one + exp(zero - gate)) * load_some(ups + i, count), count);
    });
  }
}

void silu_and_mul(const SiluAndMulParams& p) {
  p.dtype == DType::kFloat32 ? silu_and_mul_rows<float>(p) : silu_and_mul_rows<BFloat16>(p);
}

}  // namespace pearl::PEARL_ISA
