// Around the products of a mixture of experts: their activation, and the sum of what they make.

namespace pearl::PEARL_ISA {

inline Vec sigmoid(Vec x) { return broadcast(1.0f) / (broadcast(1.0f) + exp(broadcast(0.0f) - x)); }

template <class T>
void gated_unit_rows(const GatedUnitParams& p) {
  const GatedUnit unit = p.unit;
  const Vec gain = broadcast(unit.gain), limit = broadcast(unit.limit), offset = broadcast(unit.offset);
  // As in silu_and_mul. A clamp's second operand is the number, so that a NaN stays one.
  const Vec least = broadcast(-88.37f / unit.gain), lower = broadcast(-unit.limit), zero = broadcast(0.0f);
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* gates = static_cast<const T*>(p.x) + row * 2 * p.width;
    T* out = static_cast<T*>(p.out) + row * p.width;
    for_each_vector(p.width, [&](int64_t i, int64_t count) {
      const Vec gate = min(limit, max(least, load_some(gates + i, count)));
      const Vec up = min(limit, max(lower, load_some(gates + p.width + i, count)));
      store_some(out + i, gate / (broadcast(1.0f) + exp(zero - gain * gate)) * (up + offset), count);
    });
  }
}

void gated_unit(const GatedUnitParams& p) {
  p.dtype == DType::kFloat32 ? gated_unit_rows<float>(p) : gated_unit_rows<BFloat16>(p);
}

template <class T>
void combine_rows(const CombineParams& p) {
  const T *made = static_cast<const T*>(p.made), *shared = static_cast<const T*>(p.shared);
  const T* gates = static_cast<const T*>(p.shared_gate);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int32_t* places = p.places + row * p.top_k;
    const float* weights = p.weights + row * p.top_k;
    float gate[kLanes] = {};
    if (shared != nullptr) store(gate, sigmoid(load_first(gates + row, 1)));
    for_each_vector(p.width, [&](int64_t i, int64_t count) {
      Vec sum = broadcast(0.0f);
      if (shared != nullptr) sum = broadcast(gate[0]) * load_some(shared + row * p.width + i, count);
      for (int64_t k = 0; k < p.top_k; ++k) {
        sum = sum + broadcast(weights[k]) * load_some(made + places[k] * p.width + i, count);
      }
      store_some(static_cast<T*>(p.out) + row * p.width + i, sum, count);
    });
  }
}

void combine(const CombineParams& p) {
  p.dtype == DType::kFloat32 ? combine_rows<float>(p) : combine_rows<BFloat16>(p);
}

}  // namespace pearl::PEARL_ISA
