// Keyed draws from the distributions of rows.

namespace pearl::PEARL_ISA {

// Streams of pearl_kernels/reference/philox.py.
inline constexpr uint32_t kSampleStream = 0, kAcceptStream = 2, kResidualStream = 3;

/// argmax of log_weight + noise over the vocabulary, the first if several; -1 if every weight is -inf.
/// log_weight(i) gives tokens i to i + 15. Groups that cannot win any more cost no noise.
template <class LogWeight>
inline int64_t gumbel_argmax(const NoiseKey& key, int64_t vocab_size, const LogWeight& log_weight) {
  float best = kMinusInfinity;
  int64_t token = -1;
  for (int64_t first = 0; first < vocab_size; first += 4 * kLanes) {
    Vec score[4], noise[4];
    for (int j = 0; j < 4; ++j) score[j] = log_weight(first + j * kLanes);
    const float bound = reduce_max(max(max(score[0], score[1]), max(score[2], score[3]))) + kLargestNoise;
    if (!(bound > best)) continue;
    uniform_64(key, static_cast<uint32_t>(first), noise);
    for (int j = 0; j < 4; ++j) {
      score[j] = score[j] + to_gumbel(noise[j]);
      if (bitmask(broadcast(best) < score[j]) == 0) continue;
      best = reduce_max(score[j]);
      token = first + j * kLanes + __builtin_ctz(bitmask(score[j] == broadcast(best)));
    }
  }
  return token;
}

struct Draw {
  int64_t token;
  float logprob;
};

inline Draw draw(const Distribution& d, const NoiseKey& key) {
  const auto log_weight = [&](int64_t i) { return d.log_probability(i); };
  const int64_t token = gumbel_argmax(key, d.row.size, log_weight);
  if (token < 0) return {0, __builtin_nanf("")};  // a row of NaNs or infinities has no distribution
  return {token, d.log_probability_of(token)};
}

inline Draw sample_row(const LogitsRow& row, const SamplingView& sampling, int64_t entry, const NoiseKey& key) {
  if (sampling.temperature[entry] <= 0) return {argmax(row), 0.0f};
  return draw(make_distribution(row, sampling.temperature[entry], sampling.top_k[entry], sampling.top_p[entry],
                                sampling.min_p[entry]),
              key);
}

inline NoiseKey noise_key(const int64_t* seed, int64_t entry, int64_t position, uint32_t stream) {
  return {static_cast<uint64_t>(seed[entry]), static_cast<uint32_t>(position), stream};
}

}  // namespace pearl::PEARL_ISA
