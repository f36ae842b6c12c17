// sample: a draw from each row's distribution and, where they are asked for, the tokens that come next after it.

namespace pearl::PEARL_ISA {

inline constexpr int64_t kNobody = -1;

/// The largest scores that were offered, in order; of equals the first stays first. -inf and NaN are never kept.
class Best {
 public:
  explicit Best(int64_t most) : most_(most) {}

  int64_t count() const { return count_; }
  int64_t token(int64_t i) const { return token_[i]; }
  float score(int64_t i) const { return score_[i]; }

  /// What a score has to exceed.
  float bar() const { return count_ < most_ ? kMinusInfinity : score_[most_ - 1]; }

  /// Of tokens `first` to `first + 15`, which come after all that were offered before.
  void offer(Vec scores, int64_t first, int64_t excluded = kNobody) {
    uint32_t above = bitmask(broadcast(bar()) < scores);
    if (above == 0) return;
    float lanes[kLanes];
    store(lanes, scores);
    for (; above != 0; above &= above - 1) {
      const int lane = __builtin_ctz(above);
      if (first + lane != excluded && bar() < lanes[lane]) insert(lanes[lane], first + lane);
    }
  }

 private:
  void insert(float score, int64_t token) {
    int64_t at = count_ < most_ ? count_++ : most_ - 1;
    for (; at > 0 && score_[at - 1] < score; --at) {
      score_[at] = score_[at - 1];
      token_[at] = token_[at - 1];
    }
    score_[at] = score;
    token_[at] = token;
  }

  int64_t most_, count_ = 0;
  float score_[kMostAlternatives + 1] = {};
  int64_t token_[kMostAlternatives + 1] = {};
};

/// As gumbel_argmax, but not of the largest alone.
inline void gumbel_best(const NoiseKey& key, const Distribution& d, Best& best) {
  for (int64_t first = 0; first < d.row.size; first += 4 * kLanes) {
    Vec score[4], noise[4];
    for (int j = 0; j < 4; ++j) score[j] = d.log_probability(first + j * kLanes);
    const float bound = reduce_max(max(max(score[0], score[1]), max(score[2], score[3]))) + kLargestNoise;
    if (!(bound > best.bar())) continue;
    uniform_64(key, static_cast<uint32_t>(first), noise);
    for (int j = 0; j < 4; ++j) best.offer(score[j] + to_gumbel(noise[j]), first + j * kLanes);
  }
}

/// By the logits of what the distribution keeps: the order of its probabilities, without their rounding.
inline void logits_best(const Distribution& d, int64_t excluded, Best& best) {
  for (int64_t i = 0; i < d.row.size; i += kLanes) {
    const Mask kept = d.scaled(i) >= broadcast(d.cutoff);
    best.offer(select(kept, d.row.load_padded(i), broadcast(kMinusInfinity)), i, excluded);
  }
}

/// Row `row` of what was asked for: the drawn token's score, and those of `best` from `begin` on. score(i): of its
/// i-th.
template <class Score>
inline void write_ranked(const AlternativesView& out, int64_t row, float drawn, const Best& best, int64_t begin,
                         const Score& score) {
  out.drawn[row] = drawn;
  for (int64_t i = 0; i < out.count; ++i) {
    const bool there = begin + i < best.count();
    out.tokens[row * out.count + i] = there ? best.token(begin + i) : kNobody;
    out.scores[row * out.count + i] = there ? score(begin + i) : kMinusInfinity;
  }
}

inline Draw rank_greedy(const LogitsRow& row, const AlternativesView& out, int64_t at) {
  const Distribution d = make_distribution(row, 1.0f, 0, 1.0f, 0.0f);
  Best best(out.count + 1);
  if (__builtin_isfinite(d.peak)) logits_best(d, kNobody, best);
  const auto score = [&](int64_t i) { return d.log_probability_of(best.token(i)); };
  write_ranked(out, at, best.count() > 0 ? score(0) : __builtin_nanf(""), best, 1, score);
  return {argmax(row), 0.0f};
}

inline Draw rank_by_noise(const Distribution& d, const NoiseKey& key, const AlternativesView& out, int64_t at) {
  Best best(out.count + 1);
  gumbel_best(key, d, best);
  const bool drawn = best.count() > 0;
  write_ranked(out, at, drawn ? best.score(0) : __builtin_nanf(""), best, 1, [&](int64_t i) { return best.score(i); });
  return drawn ? Draw{best.token(0), d.log_probability_of(best.token(0))} : Draw{0, __builtin_nanf("")};
}

inline Draw rank_by_probability(const Distribution& d, const NoiseKey& key, const AlternativesView& out, int64_t at) {
  const Draw drawn = draw(d, key);
  Best best(out.count);
  if (__builtin_isfinite(d.peak)) logits_best(d, drawn.token, best);
  write_ranked(out, at, drawn.logprob, best, 0, [&](int64_t i) { return d.log_probability_of(best.token(i)); });
  return drawn;
}

/// Draws what sample_row draws.
inline Draw rank_row(const LogitsRow& row, const SamplingView& s, const NoiseKey& key, const AlternativesView& out,
                     int64_t at) {
  if (s.temperature[at] <= 0) return rank_greedy(row, out, at);
  const Distribution d = make_distribution(row, s.temperature[at], s.top_k[at], s.top_p[at], s.min_p[at]);
  return key.stream == kSampleStream ? rank_by_noise(d, key, out, at) : rank_by_probability(d, key, out, at);
}

void sample(const SampleParams& p) {
  for (int64_t row = 0; row < p.logits.rows; ++row) {
    const NoiseKey key = noise_key(p.sampling.seed, row, p.positions[row], p.stream);
    const LogitsRow logits = row_of(p.logits, row, p.vocab_size);
    const Draw drawn = p.alternatives.count == 0 ? sample_row(logits, p.sampling, row, key)
                                                 : rank_row(logits, p.sampling, key, p.alternatives, row);
    p.tokens[row] = drawn.token;
    p.logprobs[row] = drawn.logprob;
  }
}

}  // namespace pearl::PEARL_ISA
