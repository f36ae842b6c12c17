// A row of logits as its request's distribution: softmax(logits / temperature), cut and renormalised.
//
// Nothing of the vocabulary's size is stored. The row is read again where it is needed; it stays in the cache.

namespace pearl::PEARL_ISA {

struct LogitsRow {
  const void* data;
  DType dtype;
  int64_t size;  // the vocabulary's; what follows in memory is padding

  /// Logits i to i + 15; -inf, which has no probability, past the end.
  Vec load_padded(int64_t i) const {
    return dtype == DType::kFloat32 ? load_padded(static_cast<const float*>(data), i)
                                    : load_padded(static_cast<const BFloat16*>(data), i);
  }

 private:
  template <class T>
  Vec load_padded(const T* row, int64_t i) const {
    const int64_t left = size - i;
    if (left >= kLanes) return load(row + i);
    if (left <= 0) return broadcast(kMinusInfinity);
    return select(lane_range(0, left), load_first(row + i, left), broadcast(kMinusInfinity));
  }
};

inline LogitsRow row_of(const LogitsView& view, int64_t row, int64_t vocab_size) {
  const int64_t element = view.dtype == DType::kFloat32 ? sizeof(float) : sizeof(BFloat16);
  return {static_cast<const char*>(view.data) + row * view.stride * element, view.dtype, vocab_size};
}

inline float largest(const LogitsRow& row) {
  Vec top[4] = {broadcast(kMinusInfinity), broadcast(kMinusInfinity), broadcast(kMinusInfinity),
                broadcast(kMinusInfinity)};
  for (int64_t i = 0; i < row.size; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) top[j] = max(row.load_padded(i + j * kLanes), top[j]);
  }
  return reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
}

/// The first of the largest logits; 0 for a row of NaNs.
inline int64_t argmax(const LogitsRow& row) {
  const Vec top = broadcast(largest(row));
  for (int64_t i = 0; i < row.size; i += kLanes) {
    const uint32_t found = bitmask(row.load_padded(i) == top);
    if (found == 0) continue;
    const int64_t token = i + __builtin_ctz(found);
    return token < row.size ? token : 0;  // what follows the end is -inf, as the largest of a row of NaNs
  }
  return 0;
}

struct Distribution {
  LogitsRow row;
  float temperature;  // > 0
  float peak;         // of logits / temperature
  float cutoff;       // kept: z >= cutoff
  float log_mass;     // log of the sum of exp(z) over what is kept

  /// z = logits / temperature - peak, <= 0.
  Vec scaled(int64_t i) const { return row.load_padded(i) / broadcast(temperature) - broadcast(peak); }

  /// -inf for excluded tokens.
  Vec log_probability(int64_t i) const {
    const Vec z = scaled(i);
    return select(z >= broadcast(cutoff), z - broadcast(log_mass), broadcast(kMinusInfinity));
  }

  float log_probability_of(int64_t token) const {
    float lanes[kLanes];
    store(lanes, log_probability(token - token % kLanes));
    return lanes[token % kLanes];
  }
};

/// The sum of a row's values, value(i) giving those of tokens i to i + 15; fp32 within 64 vectors, double beyond.
template <class Value>
inline double sum_over(int64_t size, const Value& value) {
  constexpr int64_t kChunk = 64 * kLanes;
  double total = 0;
  for (int64_t begin = 0; begin < size; begin += kChunk) {
    Vec sum = broadcast(0.0f);
    for (int64_t i = begin; i < begin + kChunk && i < size; i += kLanes) sum = sum + value(i);
    total += static_cast<double>(reduce_add(sum));
  }
  return total;
}

/// Sum of exp(z) over what is kept.
inline double kept_mass(const Distribution& d) {
  return sum_over(d.row.size, [&](int64_t i) {
    const Vec z = d.scaled(i);
    return select(z >= broadcast(d.cutoff), exp(z), broadcast(0.0f));
  });
}

inline Distribution make_distribution(const LogitsRow& row, float temperature, int64_t top_k, float top_p,
                                      float min_p) {
  Distribution d = {row, temperature, largest(row) / temperature, kMinusInfinity, 0.0f};
  const auto scaled = [&](int64_t i) { return d.scaled(i); };
  uint32_t last_key = kLastKey;
  if (top_k > 0 && top_k < row.size) last_key = find_key<Weight::kCount>(row.size, scaled, last_key, top_k);
  if (top_p < 1.0f) last_key = find_key<Weight::kMass>(row.size, scaled, last_key, top_p);
  d.cutoff = value_of_key(last_key);
  if (min_p > 0.0f) {
    const float floor = __builtin_logf(min_p);
    d.cutoff = floor > d.cutoff ? floor : d.cutoff;
  }
  d.log_mass = static_cast<float>(__builtin_log(kept_mass(d)));
  return d;
}

}  // namespace pearl::PEARL_ISA
