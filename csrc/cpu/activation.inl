// silu_and_mul and gelu_and_mul: both activations are x / (1 + e^-t(x)).

namespace pearl::PEARL_ISA {

struct Silu {
  static Vec negated(Vec x) { return broadcast(0.0f) - x; }
};

/// 0.5 x (1 + tanh(u)) is x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
struct GeluTanh {
  static Vec negated(Vec x) {
    return (broadcast(-1.59576912f) * x) * mul_add(broadcast(0.044715f) * x, x, broadcast(1.0f));
  }
};

template <class T, class Activation>
void activate_rows(const GatedParams& p) {
  const Vec one = broadcast(1.0f);
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* gates = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* ups = gates + p.width;
    T* out = static_cast<T*>(p.out) + row * p.width;
    for_each_vector(p.width, [&](int64_t i, int64_t count) {
      // Below -88.37 exp no longer grows; a bounded numerator keeps the result at zero there.
      const Vec gate = max(broadcast(-88.37f), load_some(gates + i, count));
      store_some(out + i, gate / (one + exp(Activation::negated(gate))) * load_some(ups + i, count), count);
    });
  }
}

template <class Kind>
void activate(const GatedParams& p) {
  p.dtype == DType::kFloat32 ? activate_rows<float, Kind>(p) : activate_rows<BFloat16, Kind>(p);
}

void gated_activation(const GatedParams& p) {
  p.activation == Activation::kSilu ? activate<Silu>(p) : activate<GeluTanh>(p);
}

}  // namespace pearl::PEARL_ISA
